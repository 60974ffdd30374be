"""The all-to-all exchange of token rows between the ranks that hold the experts."""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor


class AllToAll:
    """Variable-size exchange over one group, differentiable. Implements ``moe.types.Exchange``.

    Any number of tensors travels as one message: their rows are packed side by side as bytes. A rank may send or
    receive no rows; every rank of the group must call in the same order.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.size = dist.get_world_size(group)

    def exchange_counts(self, counts: Int[Tensor, "ranks local_experts"]) -> Int[Tensor, "ranks local_experts"]:
        """Send row ``r`` to rank ``r``."""
        sent = counts.contiguous()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        return received

    def start(self, rows: list[Tensor], send: list[int], receive: list[int]) -> "Pending":
        """Start sending consecutive blocks of ``send[r]`` rows to rank ``r``."""
        message = _Message(self.group, send, receive)
        return Pending(message, _Start.apply(message, *rows))


class Pending:
    """Rows on their way; ``wait`` returns them."""

    def __init__(self, message: "_Message", buffers: tuple[Tensor, ...]):
        self._message = message
        self._buffers = buffers

    def wait(self) -> list[Tensor]:
        """Rows in order of the sending rank."""
        return list(_Wait.apply(self._message, *self._buffers))


ROW_ALIGNMENT_BYTES = 16
"""NCCL copies a block of rows in packs of 16 bytes if it begins at a multiple of them, else byte by byte. A row of 768
numbers in bfloat16 and a weight has 1,540 bytes, and three of four blocks would begin beside one."""


class _Message:
    """One packed all-to-all and, with the sizes swapped, its backward."""

    def __init__(self, group: dist.ProcessGroup, send: list[int], receive: list[int]):
        self.group, self.send, self.receive = group, send, receive
        self._work: dist.Work | None = None
        self._packed: Tensor | None = None
        self._received: Tensor | None = None

    def begin(self, rows: tuple[Tensor, ...], send: list[int], receive: list[int]) -> None:
        parts = [part.contiguous().view(torch.uint8) for part in rows]
        if padding := -sum(part.shape[1] for part in parts) % ROW_ALIGNMENT_BYTES:
            parts.append(parts[0].new_zeros(len(parts[0]), padding))
        # Kept until the wait: the backend reads it while the transfer runs.
        self._packed = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        self._received = self._packed.new_empty(sum(receive), self._packed.shape[1])
        self._work = dist.all_to_all_single(
            self._received, self._packed, receive, send, group=self.group, async_op=True
        )

    def finish(self, like: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Wait and unpack into tensors with the columns and dtypes of ``like``."""
        assert self._work is not None and self._received is not None
        self._work.wait()
        sizes = [part.shape[1] * part.element_size() for part in like]
        columns = self._received[:, : sum(sizes)].split(sizes, dim=1)
        unpacked = tuple(column.contiguous().view(part.dtype) for column, part in zip(columns, like, strict=True))
        self._work = self._packed = self._received = None
        return unpacked


class _Start(torch.autograd.Function):
    """Forward starts the exchange; its outputs only carry shapes and the graph. Backward ends the reverse one."""

    @staticmethod
    def forward(ctx: Any, message: _Message, *rows: Tensor) -> tuple[Tensor, ...]:
        ctx.message = message
        message.begin(rows, message.send, message.receive)
        return _placeholders(rows, sum(message.receive))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.message.finish(grads)


class _Wait(torch.autograd.Function):
    """Forward ends the exchange; backward starts the reverse one, so work between the two overlaps both ways."""

    @staticmethod
    def forward(ctx: Any, message: _Message, *buffers: Tensor) -> tuple[Tensor, ...]:
        ctx.message = message
        return message.finish(buffers)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        message = ctx.message
        message.begin(grads, message.receive, message.send)
        return None, *_placeholders(grads, sum(message.receive))


def _placeholders(like: tuple[Tensor, ...], num_rows: int) -> tuple[Tensor, ...]:
    """Tensors that only carry a shape and a dtype through the graph while the data is on its way; no memory."""
    return tuple(part.new_empty(1, 1).expand(num_rows, part.shape[1]) for part in like)
