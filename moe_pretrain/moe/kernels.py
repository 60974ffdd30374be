"""Kernels in place of torch's: which a run takes, and the calls of liger-kernel (extra ``kernels``).

quack-kernels' (extra ``quack``) are those of experts, ``experts/fused_products.py``; all else stays torch's with them.
Of liger's four are taken, with statistics in float32 as in ours and no wait of the host for the device:

- the loss and its gradient of a chunk of logits: one kernel, the gradient in the place of the logits;
- RMSNorm: one kernel back for the gradients of rows and weight, where torch reads the rows twice;
- the same with the sum that it is the norm of, and the sum's gradient;
- SwiGLU of dense networks and shared experts: one kernel each way, which keeps gate and up alone.

Left out are liger's product and loss in one call, which asks the device for the number of labels and for the factor of
the loss, chooses its own chunks, and scales in place; and its activation for routed experts, whose backward kernel of
ours also makes the gradient of the routes' weights. The norm of a latent space and predictions of two passes (``thor``)
stay torch's.
"""

from dataclasses import dataclass
from importlib import metadata, util
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Kernels = Literal["torch", "liger", "quack"]
KernelChoice = Literal["auto", "torch", "liger", "quack"]


@dataclass(frozen=True)
class _Package:
    """Versions from ``oldest`` to ``latest``, before ``before``, take the arguments that they are called with here."""

    name: str
    extra: str
    oldest: tuple[int, ...]
    before: tuple[int, ...]
    latest: str


_LIGER = _Package("liger-kernel", "kernels", (0, 8, 5), (0, 9), "0.8.x")
_QUACK = _Package("quack-kernels", "quack", (0, 6, 5), (0, 7), "0.6.x")


def resolve_kernels(asked: KernelChoice, device: str) -> Kernels:
    """Decide which kernels a run on ``cuda`` or ``cpu`` takes; ``auto`` is liger's on CUDA where they are installed.

    Raises:
        ValueError: ``liger`` or ``quack`` is asked for where it cannot run.
    """
    if asked == "torch":
        return "torch"
    reason = _no_quack(device) if asked == "quack" else _lacks(_LIGER, device)
    if reason is None:
        return "quack" if asked == "quack" else "liger"
    if asked == "auto":
        return "torch"
    raise ValueError(f"engine.kernels={asked} must be auto or torch: {reason}")


def priced_kernels(asked: KernelChoice, device: str) -> Kernels:
    """Kernels that a run on ``device`` would take, asked where there need be no such device.

    ``liger`` and ``quack`` are believed; of ``auto`` it is what is installed here that decides.
    """
    if device != "cuda":
        return "torch"
    if asked == "auto":
        return "liger" if _lacks(_LIGER, device) is None else "torch"
    return asked


def _lacks(package: _Package, device: str) -> str | None:
    """Reason why the kernels of a package cannot run here; None if they can."""
    if device != "cuda":
        return f"its kernels run on CUDA, and this run is on the {device.upper()}"
    name, wanted = package.name, f"pip install 'moe_pretrain[{package.extra}]'"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return f"{name} is not installed ({wanted})"
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
    if not package.oldest <= numbers < package.before:
        oldest = ".".join(map(str, package.oldest))
        return (
            f"{name} {version} is installed, and its kernels are called as those of {oldest} to {package.latest} "
            f"({wanted})"
        )
    if util.find_spec("triton") is None:
        return f"{name} is installed without triton ({wanted})"
    return None


def _no_quack(device: str) -> str | None:
    reason = _lacks(_QUACK, device)
    if reason is None and torch.cuda.is_available() and (major := torch.cuda.get_device_capability()[0]) < 9:
        return f"its kernels are for Hopper and Blackwell, and this GPU is of compute capability {major}"
    return reason


def liger_rms_norm(
    hidden: Float[Tensor, "... hidden"], weight: Float[Tensor, "hidden"], epsilon: float
) -> Float[Tensor, "... hidden"]:
    """``functional.rms_norm`` over the last axis; all of it is float32 inside, with one rounding at the end."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # "gemma" names what is float32; in place, its backward would overwrite a gradient that others may hold.
    return LigerRMSNormFunction.apply(hidden, weight, epsilon, 0.0, "gemma", False)


def liger_added_norm(
    hidden: Float[Tensor, "... hidden"],
    delta: Float[Tensor, "... hidden"],
    weight: Float[Tensor, "hidden"],
    epsilon: float,
) -> tuple[Float[Tensor, "... hidden"], Float[Tensor, "... hidden"]]:
    """``hidden + delta``, and ``liger_rms_norm`` of it."""
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    normed, total = LigerFusedAddRMSNormFunction.apply(delta, hidden, weight, epsilon, 0.0, "gemma", False)
    return total, normed


def liger_swiglu(before: Float[Tensor, "... width2"]) -> Float[Tensor, "... width"]:
    """``silu(gate) * up`` of ``before = [gate, up]``, rounded after silu as torch's; backward is float32 inside."""
    from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction

    # Flat, as its gradient comes back.
    rows = LigerFusedGateUpSiLUMulFunction.apply(before.flatten(0, -2))
    return rows.view(*before.shape[:-1], before.shape[-1] // 2)


def liger_cross_entropy_(
    logits: Float[Tensor, "tokens vocab"], labels: Int[Tensor, "tokens"], ignore_index: int, needs_grad: bool
) -> Float[Tensor, "tokens 1"]:
    """Cross-entropy of each position, whose gradient takes the place of the logits if ``needs_grad``.

    The kernel is launched by itself: the functions around it read the number of labels and their range from the device.

    Args:
        logits: Of one chunk, rows contiguous; lost.
        labels: Target ids below ``vocab``, or ``ignore_index``; the caller's to check, the kernel reads beside the row.
        ignore_index: Label of positions that do not count: 0, and no gradient.
        needs_grad: Whether the gradient of the terms' sum is made.

    Returns:
        Nats, float32.
    """
    import triton
    from liger_kernel.ops.cross_entropy import MAX_FUSED_SIZE, liger_cross_entropy_kernel

    tokens, vocab = logits.shape
    terms = torch.zeros(tokens, 1, dtype=torch.float32, device=logits.device)
    if tokens == 0:
        return terms
    absent = {name: None for name in ("weight_ptr", "z_loss_ptr", "token_accuracy_ptr", "predicted_tokens_ptr")}
    liger_cross_entropy_kernel[(tokens,)](
        X_ptr=logits,
        X_stride=logits.stride(0),
        Y_ptr=labels,
        Y_stride=labels.stride(0),
        loss_ptr=terms,
        loss_stride=1,
        token_accuracy_stride=0,
        predicted_tokens_stride=0,
        n_cols=vocab,
        n_non_ignore=1,  # read for a mean alone, as the next two for weights of classes
        sum_non_ignore_weight=1,
        weight_sum=0.0,
        ignore_index=ignore_index,
        lse_square_scale=0.0,
        label_smoothing=0.0,
        reduction="sum",
        softcap=None,
        RETURN_Z_LOSS=False,
        RETURN_TOKEN_ACCURACY=False,
        RETURN_PREDICTED_TOKENS=False,
        BLOCK_SIZE=min(MAX_FUSED_SIZE, triton.next_power_of_2(vocab)),
        HAS_WEIGHT=False,
        HAS_SOFTCAPPING=False,
        HAS_GRADIENTS=needs_grad,
        num_warps=32,  # as liger launches it
        **absent,
    )
    return terms
