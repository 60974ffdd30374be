"""Token embedding, whose gradient is summed in float32."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional


def embed(
    input_ids: Int[Tensor, "batch sequence"], weight: Float[Tensor, "vocab hidden"]
) -> Float[Tensor, "batch sequence hidden"]:
    """Rows of ``weight``; the gradient of each is a sum over its tokens in float32, whatever the dtype.

    torch sums in the dtype of the weight on the CPU: in bfloat16 a sum stands still once it is 256 times its next part,
    and the most frequent tokens' gradients come out several percent short.
    """
    if weight.dtype != torch.bfloat16 or weight.is_cuda:  # CUDA kernels sum in float32
        return functional.embedding(input_ids, weight)
    return _ExactEmbedding.apply(input_ids, weight)


class _ExactEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(input_ids)
        ctx.shape = weight.shape
        return functional.embedding(input_ids, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        (input_ids,) = ctx.saved_tensors
        wide = torch.ops.aten.embedding_dense_backward(grads[0].float(), input_ids, ctx.shape[0], -1, False)
        return None, wide.to(grads[0].dtype)
