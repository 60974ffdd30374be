"""Kernels of liger-kernel (extra ``kernels``) in place of torch's: which of the two a run takes, and the calls.

Three are taken, with statistics in float32 as in ours and no wait of the host for the device:

- the loss and its gradient of a chunk of logits: one kernel, the gradient in the place of the logits;
- RMSNorm: one kernel back for the gradients of rows and weight, where torch reads the rows twice;
- SwiGLU of dense networks and shared experts: one kernel each way, which keeps gate and up alone.

Left out are liger's product and loss in one call, which asks the device for the number of labels and for the factor of
the loss, chooses its own chunks, and scales in place; and its activation for routed experts, whose backward kernel of
ours also makes the gradient of the routes' weights. The norm of a latent space and predictions of two passes (``thor``)
stay torch's.
"""

from importlib import metadata, util
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Kernels = Literal["torch", "liger"]
KernelChoice = Literal["auto", "torch", "liger"]
_OLDEST, _BEFORE = (0, 8, 5), (0, 9)
"""Versions of liger-kernel whose kernels take the arguments below."""


def resolve_kernels(asked: KernelChoice, device: str) -> Kernels:
    """Decide which kernels a run on ``cuda`` or ``cpu`` takes; ``auto`` is liger's on CUDA where they are installed.

    Raises:
        ValueError: ``liger`` is asked for where it cannot run.
    """
    if asked == "torch":
        return "torch"
    reason = _no_liger(device)
    if reason is None:
        return "liger"
    if asked == "auto":
        return "torch"
    raise ValueError(f"engine.kernels=liger must be auto or torch: {reason}")


def priced_kernels(asked: KernelChoice, device: str) -> Kernels:
    """Kernels that a run on ``device`` would take, asked where there need be no such device.

    ``liger`` is believed; of ``auto`` it is what is installed here that decides.
    """
    if device != "cuda" or asked == "torch":
        return "torch"
    return "liger" if asked == "liger" or _no_liger(device) is None else "torch"


def _no_liger(device: str) -> str | None:
    """Reason why liger's kernels cannot run here; None if they can."""
    if device != "cuda":
        return f"its kernels run on CUDA, and this run is on the {device.upper()}"
    wanted = "pip install 'moe_pretrain[kernels]'"
    try:
        version = metadata.version("liger-kernel")
    except metadata.PackageNotFoundError:
        return f"liger-kernel is not installed ({wanted})"
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
    if not _OLDEST <= numbers < _BEFORE:
        return f"liger-kernel {version} is installed, and its kernels are called as those of 0.8.5 to 0.8.x ({wanted})"
    if util.find_spec("triton") is None:
        return f"liger-kernel is installed without triton ({wanted})"
    return None


def liger_rms_norm(
    hidden: Float[Tensor, "... hidden"], weight: Float[Tensor, "hidden"], epsilon: float
) -> Float[Tensor, "... hidden"]:
    """``functional.rms_norm`` over the last axis; all of it is float32 inside, with one rounding at the end."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # "gemma" names what is float32; in place, its backward would overwrite a gradient that others may hold.
    return LigerRMSNormFunction.apply(hidden, weight, epsilon, 0.0, "gemma", False)


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
