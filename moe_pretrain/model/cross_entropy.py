"""Cross-entropy of the next token in chunks, so that the logits of all positions never exist at once.

Axis names: ``tokens`` positions of the micro-batch, ``vocab`` tokens of the vocabulary, ``hidden`` model width.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from moe_pretrain.moe.compiled import one_kernel_on_cuda
from moe_pretrain.moe.kernels import Kernels, liger_cross_entropy_

IGNORE_INDEX = -100
"""Label of a position whose prediction is not counted."""


def chunked_cross_entropy(
    hidden: Float[Tensor, "tokens hidden"],
    head_weight: Float[Tensor, "vocab hidden"],
    labels: Int[Tensor, "tokens"],
    chunk_tokens: int,
    kernels: Kernels = "torch",
) -> Float[Tensor, ""]:
    """Sum of ``-log softmax(hidden @ head_weight.T)[label]`` over counted positions, without the logits.

    Logits exist for ``chunk_tokens`` positions at a time. The gradients are made in forward, while a chunk's
    logits are there, so backward only scales them. Log-sum-exp and the sum are float32 for any input dtype.

    Args:
        hidden: Final normed hidden states.
        head_weight: Output embedding.
        labels: Target ids, ``IGNORE_INDEX`` where not counted.
        chunk_tokens: Positions per chunk.
        kernels: Whose kernel makes a chunk's loss and its gradient.

    Returns:
        The sum in nats, float32; divide by the number of counted positions of the global batch (defect C20).

    Raises:
        RuntimeError: A label is neither; on a GPU by the next operation that waits for it.
    """
    _require_labels(labels, head_weight)
    # Inside forward neither the grad mode nor needs_input_grad tells that this is an evaluation.
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or head_weight.requires_grad)
    return _ChunkedCrossEntropy.apply(hidden, head_weight, labels, chunk_tokens, needs_grad, kernels)


def _require_labels(labels: Tensor, head_weight: Tensor) -> None:
    """Refuse labels for which there is no logit, without a wait for the device: kernels would read beside a row."""
    message = f"labels must be ids below the vocabulary's size, {len(head_weight)}, or IGNORE_INDEX={IGNORE_INDEX}"
    torch._assert_async(_all_in_vocabulary(labels, len(head_weight)), message)


@one_kernel_on_cuda
def _all_in_vocabulary(labels: Tensor, vocab: int) -> Tensor:
    return (((labels >= 0) & (labels < vocab)) | (labels == IGNORE_INDEX)).all()


def two_pass_losses(
    first: Float[Tensor, "tokens hidden"],
    second: Float[Tensor, "tokens hidden"],
    head_weight: Float[Tensor, "vocab hidden"],
    labels: Int[Tensor, "tokens"],
    text: Bool[Tensor, "tokens"],
    chunk_tokens: int,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Cross-entropy of two predictions of the same tokens, and how far they are apart; without the logits.

    Four float32 tensors over the vocabulary exist for ``chunk_tokens / 4`` positions at a time, so as many numbers as
    one pass needs. Both passes' logits are made again in backward.

    Args:
        first: Final normed hidden states of the first pass.
        second: Those of the second.
        head_weight: Output embedding.
        labels: Target ids, ``IGNORE_INDEX`` where not counted.
        text: Positions at which predictions are compared.
        chunk_tokens: Positions per chunk of a single pass.

    Returns:
        ``(CE(p1) + CE(p2)) / 2`` summed over counted positions, and ``1/2 sum_v (p1 - p2) (log p1 - log p2)`` summed
        over text; nats, float32.

    Raises:
        RuntimeError: As ``chunked_cross_entropy``.

    Source:
        THOR (arXiv:2110.04260), equations 5 and 6.
    """
    _require_labels(labels, head_weight)
    return _TwoPassLosses.apply(first, second, head_weight, labels, text, max(1, chunk_tokens // 4))


class _TwoPassLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, first: Tensor, second: Tensor, head_weight: Tensor, labels: Tensor, text: Tensor, chunk_tokens: int
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(first, second, head_weight, labels, text)
        ctx.chunk_tokens = chunk_tokens
        cross_entropy, divergence = (first.new_zeros((), dtype=torch.float32) for _ in range(2))
        for start in range(0, len(labels), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            log_first, log_second = (_log_probs(hidden[part], head_weight) for hidden in (first, second))
            target = labels[part]
            index, counted = target.clamp(min=0)[:, None], (target != IGNORE_INDEX)[:, None]
            of_target = log_first.gather(1, index) + log_second.gather(1, index)
            cross_entropy -= (of_target * counted).sum() / 2
            apart = log_first.exp().sub_(log_second.exp())
            apart.mul_(log_first.sub_(log_second))
            divergence += (apart.sum(dim=-1) * text[part]).sum() / 2
        return cross_entropy, divergence

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        first, second, head_weight, labels, text = ctx.saved_tensors
        of_cross_entropy, of_divergence = grads[0] / 2, grads[1] / 2
        grad_first, grad_second = torch.empty_like(first), torch.empty_like(second)
        grad_weight = torch.zeros_like(head_weight, dtype=torch.float32)
        for start in range(0, len(labels), ctx.chunk_tokens):
            part = slice(start, start + ctx.chunk_tokens)
            log_first, log_second = (_log_probs(hidden[part], head_weight) for hidden in (first, second))
            probs = log_first.exp(), log_second.exp()
            ratio = log_first.sub_(log_second)  # log p1 - log p2
            del log_first, log_second
            target = labels[part]
            index, counted = target.clamp(min=0)[:, None], (target != IGNORE_INDEX)[:, None]
            apart = (text[part] * of_divergence)[:, None]
            hit = (counted * of_cross_entropy).to(ratio.dtype)
            for own, other, sign, hidden, grad_hidden in (
                (probs[0], probs[1], 1, first, grad_first),
                (probs[1], probs[0], -1, second, grad_second),
            ):
                # d/dz of sum_v (p - q) (log p - log q): p ratio + p - q - p sum_v p ratio, with the other's p as q.
                grad_logits = own * ratio if sign == 1 else -(own * ratio)
                grad_logits.addcmul_(own, grad_logits.sum(dim=-1, keepdim=True), value=-1)
                grad_logits.add_(own).sub_(other).mul_(apart)
                grad_logits.addcmul_(own, hit)
                grad_logits.scatter_add_(1, index, -hit)
                grad_logits = grad_logits.to(hidden.dtype)
                grad_hidden[part] = grad_logits @ head_weight
                grad_weight += grad_logits.t() @ hidden[part]
        return grad_first, grad_second, grad_weight.to(head_weight.dtype), None, None, None


def _log_probs(hidden: Tensor, head_weight: Tensor) -> Tensor:
    return functional.linear(hidden, head_weight).float().log_softmax(dim=-1)


@torch.no_grad()
def token_losses(
    hidden: Float[Tensor, "tokens hidden"],
    head_weight: Float[Tensor, "vocab hidden"],
    labels: Int[Tensor, "tokens"],
    chunk_tokens: int,
) -> Float[Tensor, "tokens"]:
    """Terms of ``chunked_cross_entropy``: nats of each position, float32, 0 where not counted; no gradient."""
    parts = zip(hidden.split(chunk_tokens), labels.split(chunk_tokens), strict=True)
    losses = [
        functional.cross_entropy(
            functional.linear(part, head_weight).float(), target, ignore_index=IGNORE_INDEX, reduction="none"
        )
        for part, target in parts
    ]
    return torch.cat(losses)


def _cross_entropy(
    hidden: Float[Tensor, "tokens hidden"],
    head_weight: Float[Tensor, "vocab hidden"],
    labels: Int[Tensor, "tokens"],
    needs_grad: bool,
    kernels: Kernels,
) -> tuple[Float[Tensor, "tokens 1"], Float[Tensor, "tokens vocab"] | None]:
    """Term of each position, and the gradient of their sum with respect to the logits, in their dtype."""
    logits = functional.linear(hidden, head_weight)
    if kernels == "liger":
        terms = liger_cross_entropy_(logits, labels, IGNORE_INDEX, needs_grad)
        return terms, logits if needs_grad else None
    if logits.is_cuda:
        terms, largest, normaliser = _cross_entropy_sums(logits, labels)
        return terms, _cross_entropy_gradient(logits, labels, largest, normaliser) if needs_grad else None
    dtype, logits = logits.dtype, logits.float()  # under this name: those of 16 bits are not kept beside
    counted = (labels != IGNORE_INDEX)[:, None]
    index = labels.clamp(min=0)[:, None]
    target_logits = logits.gather(1, index)
    largest = logits.amax(dim=-1, keepdim=True)
    exponentials = logits.sub_(largest).exp_()  # in place, and once: it serves the loss and the gradient
    normaliser = exponentials.sum(dim=-1, keepdim=True)
    terms = (normaliser.log() + largest - target_logits) * counted
    if not needs_grad:
        return terms, None
    grad_logits = exponentials.div_(normaliser)
    grad_logits.scatter_add_(1, index, torch.full_like(index, -1, dtype=torch.float32))
    return terms, grad_logits.mul_(counted).to(dtype)


@one_kernel_on_cuda
def _cross_entropy_sums(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Terms of positions; their largest logits, and sums of exponentials without these."""
    wide = logits.float()
    largest = wide.amax(dim=-1, keepdim=True)
    normaliser = (wide - largest).exp().sum(dim=-1, keepdim=True)
    target_logits = logits.gather(1, labels.clamp(min=0)[:, None]).float()
    terms = (normaliser.log() + largest - target_logits) * (labels != IGNORE_INDEX)[:, None]
    return terms, largest, normaliser


@one_kernel_on_cuda
def _cross_entropy_gradient(logits: Tensor, labels: Tensor, largest: Tensor, normaliser: Tensor) -> Tensor:
    probs = (logits.float() - largest).exp() / normaliser
    hit = torch.arange(logits.shape[1], device=logits.device) == labels[:, None]
    return ((probs - hit.float()) * (labels != IGNORE_INDEX)[:, None]).to(logits.dtype)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        labels: Tensor,
        chunk_tokens: int,
        needs_grad: bool,
        kernels: Kernels,
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        # float32, because in bfloat16 the sum over chunks would lose the later ones.
        grad_weight = torch.zeros_like(head_weight, dtype=torch.float32) if needs_grad else None
        for start in range(0, hidden.shape[0], chunk_tokens):
            part = slice(start, start + chunk_tokens)
            terms, grad_logits = _cross_entropy(hidden[part], head_weight, labels[part], needs_grad, kernels)
            total += terms.sum()
            if grad_hidden is None or grad_weight is None or grad_logits is None:
                continue
            grad_hidden[part] = grad_logits @ head_weight
            grad_weight += grad_logits.t() @ hidden[part]
            del grad_logits  # else two chunks are there while the next logits are made
        if grad_hidden is not None and grad_weight is not None:
            ctx.save_for_backward(grad_hidden, grad_weight.to(head_weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        # 0-dim factors do not promote: bfloat16 gradients stay bfloat16.
        return grad_hidden * grads[0], grad_weight * grads[0], None, None, None, None
