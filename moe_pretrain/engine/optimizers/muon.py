"""Muon for the matrices of hidden layers, each expert's by itself; AdamW for everything else."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field, PositiveFloat
from torch import Tensor

from moe_pretrain.engine.newton_schulz import newton_schulz, newton_schulz_flops
from moe_pretrain.engine.optimizers.base import Fragment, OptimizerConfig, OptimizerState, Withholding
from moe_pretrain.model.decoder import DecoderLM, ModelConfig
from moe_pretrain.model.parameter_groups import ParameterRole, meta_model, parameter_roles
from moe_pretrain.moe.routers.config import RouterConfig
from moe_pretrain.moe.types import sharded_parameters

MATRIX_STATE = OptimizerState(moments=("momentum",))
VECTOR_STATE = OptimizerState(moments=("exp_avg", "exp_avg_sq"))
_RMS = 0.2
"""Root mean square of AdamW's updates, and so of these (arXiv:2502.16982, eq. 4)."""
_BATCH_NUMBERS = 2**25
"""Elements of the matrices that are orthogonalised together."""
_WORKSPACE = 4
"""Tensors of that size which exist then: the matrices, the next ones, and two Gram matrices, which are smaller."""


@dataclass(frozen=True)
class MuonConfig(OptimizerConfig):
    """Muon.

    The matrices of attention, dense networks and experts are moved by the momentum's nearest orthogonal matrix:
    ``m = momentum m + (1 - momentum) g``, ``O = newton_schulz(momentum m + (1 - momentum) g)``,
    ``w -= rate (0.2 sqrt(max(rows, columns)) O + weight_decay w)``. Query, key and value, gate and up, and all
    experts are matrices of their own; of ``experts=matrix_product`` each core is one, as the map it is
    (``core_matrix``), so an expert's matrix moves by what its cores make of their orthogonal steps. Embedding, output
    head, norms, all of a router, and what is no matrix have AdamW with the same rate and decay: the factor gives both
    updates the same root mean square.

    An expert that gets no token keeps moving along its momentum at full speed, since the update does not depend on the
    gradient's size.

    Attributes:
        name: The word that chooses this optimizer.
        momentum: Decay of the matrices' momentum, in Nesterov's form.
        beta1: Decay of AdamW's first moment.
        beta2: Decay of AdamW's second moment.
        epsilon: Added to the root of AdamW's second moment.

    Source:
        Liu et al. 2025 (arXiv:2502.16982), eq. 1-4; Jordan 2024 for Nesterov's form and the coefficients.
    """

    name: Literal["muon"]
    momentum: Annotated[float, Field(ge=0, lt=1)]
    beta1: Annotated[float, Field(ge=0, lt=1)]
    beta2: Annotated[float, Field(ge=0, lt=1)]
    epsilon: PositiveFloat

    def state(self, role: ParameterRole) -> OptimizerState:
        """Momentum of matrices; mean of gradients and of their squares for the rest."""
        return MATRIX_STATE if role.rows else VECTOR_STATE

    def width_power(self, role: ParameterRole) -> float:
        """The spectral norm of an update grows with the root of the width, not with the width as AdamW's."""
        return 0.5 if role.rows else 1.0

    def update_flops(self, model: ModelConfig, router: RouterConfig) -> float:
        """Those of Newton-Schulz, each matrix once."""
        built = meta_model(model, router)
        found = (role.matrices(built.get_parameter(name)) for name, role in parameter_roles(built).items())
        return sum(count * newton_schulz_flops(rows, columns) for own in found for count, rows, columns in own)

    def update_bytes(self, model: DecoderLM) -> float:
        """Of the largest batch of matrices, at most float32; interleaved ones are put together as a whole."""
        most = 0.0
        for (_, interleaved, rows, columns), run in groupby(_shapes_in_order(model), key=itemgetter(0)):
            count, each = sum(own for _, own in run), rows * columns
            batch = min(count, _together(each)) * each
            beside = count * each - batch if interleaved else 0
            most = max(most, 4.0 * (_WORKSPACE * batch + beside))
        return most

    def build(self, groups: list[dict[str, Any]], is_exact: bool) -> "WithholdingMuon":
        """AdamW as ``optimizer=adamw`` has it; with ``is_exact`` one matrix at a time."""
        optimizer = WithholdingMuon(
            groups, lr=self.learning_rate, betas=(self.beta1, self.beta2), eps=self.epsilon, fused=not is_exact
        )
        optimizer.momentum, optimizer.is_exact = self.momentum, is_exact
        return optimizer

    def conditioned(self) -> "MuonConfig":
        """A larger epsilon for AdamW; orthogonalised matrices are smooth in the gradient as they are."""
        return replace(self, epsilon=max(1e-3, self.epsilon))

    def check(self, model: DecoderLM) -> None:
        """Raise if all that would be learnt is not for Muon."""
        if self.trainable == "routers":
            raise ValueError(
                "optimizer.trainable=routers must be all with optimizer.name=muon, which is not for routers"
            )


@dataclass(frozen=True)
class _Piece:
    """Piece of a parameter that is orthogonalised at once, and the part of it that this rank owns, maybe none.

    One matrix, or all those of a parameter whose rows are interleaved.

    Attributes:
        fragment: The parameter, and what this rank owns of it.
        first: First element in the flat parameter, over all shards if rows are interleaved.
        count: Matrices whose rows are interleaved.
        rows: Rows of each, over all shards.
        columns: Columns of each.
    """

    fragment: Fragment
    first: int
    count: int
    rows: int
    columns: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.count * self.rows * self.columns

    @property
    def _start(self) -> int:
        """First element that this rank owns of the parameter, counted as ``first`` is."""
        fragment = self.fragment
        shards_before = fragment.shard.rank * fragment.parameter.numel() if fragment.role.is_interleaved else 0
        return shards_before + fragment.start

    @property
    def part(self) -> slice:
        """Elements that this rank owns, in the flat piece."""
        begin = max(self._start - self.first, 0)
        end = min(self._start + self.fragment.length - self.first, self.size)
        return slice(begin, max(begin, end))

    @property
    def length(self) -> int:
        """Number of elements that this rank owns."""
        return self.part.stop - self.part.start

    @property
    def place(self) -> slice:
        """Place of these elements in the partition."""
        begin = self.fragment.partition_start + self.first + self.part.start - self._start
        return slice(begin, begin + self.length)

    @property
    def owners(self) -> dist.ProcessGroup | None:
        """Ranks that own the other parts; None for all: shards and their replicas are all ranks."""
        return None if self.fragment.role.is_interleaved else self.fragment.owners


@dataclass(frozen=True)
class _Stack:
    """Whole matrices of one shape that lie one after the other in a partition, or interleaved."""

    place: slice
    count: int
    rows: int
    columns: int

    def goes_on_with(self, piece: _Piece) -> bool:
        """Whether ``piece`` is the next one."""
        is_same = (self.rows, self.columns) == (piece.rows, piece.columns)
        return is_same and self.count == piece.count == 1 and self.place.stop == piece.place.start


def _stacked(flat: Tensor, count: int, rows: int, columns: int) -> Tensor:
    """View ``[matrices, rows, columns]`` of matrices one after the other, or of ``count`` interleaved ones."""
    return flat.view(-1, rows, columns) if count == 1 else flat.view(rows, count, columns).transpose(0, 1)


def _pieces_of(fragment: Fragment) -> Iterator[_Piece]:
    first = 0
    for count, rows, columns in fragment.role.matrices(fragment.parameter):
        if fragment.role.is_interleaved:
            yield _Piece(fragment, 0, count, rows, columns)
            continue
        for _ in range(count):
            yield _Piece(fragment, first, 1, rows, columns)
            first += rows * columns


def _are_cut(pieces: Sequence[_Piece]) -> list[bool]:
    """Of each piece, whether some rank owns a part of it that is not all. Collective, where there are ranks."""
    found = [False] * len(pieces)
    if not dist.is_initialized():
        return found
    for owners in dict.fromkeys(piece.owners for piece in pieces):
        own = [index for index, piece in enumerate(pieces) if piece.owners is owners]
        parts = [0 < pieces[index].length < pieces[index].size for index in own]
        flags = torch.tensor(parts, dtype=torch.int32, device=pieces[own[0]].fragment.partition.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=owners)
        for index, flag in zip(own, flags.tolist(), strict=True):
            found[index] = bool(flag)
    return found


def _shapes_in_order(model: DecoderLM) -> Iterator[tuple[tuple[bool, str, int, int], int]]:
    """Numbers of matrices, dense ones first and experts' behind, as partitions have them.

    With each number what neighbours that are taken together have in common: of experts or not, the name of what is
    interleaved, rows and columns.
    """
    sharded = {id(parameter) for layer in model.moe_layers() for parameter in sharded_parameters(layer.experts)}
    for of_experts in (False, True):
        for name, role in parameter_roles(model).items():
            parameter = model.get_parameter(name)
            if (id(parameter) in sharded) == of_experts:
                for count, rows, columns in role.matrices(parameter):
                    yield (of_experts, name if role.is_interleaved else "", rows, columns), count


def _together(numbers: int) -> int:
    """Matrices of so many elements that are orthogonalised together."""
    return max(1, _BATCH_NUMBERS // numbers)


def _factor(rows: int, columns: int) -> float:
    """Factor that makes the root mean square of an orthogonal matrix ``_RMS`` (arXiv:2502.16982, eq. 4)."""
    return _RMS * math.sqrt(max(rows, columns))


class _MuonAndAdamW(torch.optim.AdamW):
    """Muon for groups whose parameters have a momentum, AdamW for the others."""

    momentum: float
    is_exact: bool
    stacks: Mapping[Tensor, list[_Stack]]
    cut: Mapping[Tensor, list[_Piece]]
    dtype_of: Mapping[Tensor, torch.dtype]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every group."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if group["moments"] != MATRIX_STATE.moments]
        super().step()
        self.param_groups = groups
        for group in groups:
            if group["moments"] == MATRIX_STATE.moments:
                for partition in group["params"]:
                    if partition.grad is not None:
                        self._step_matrices(partition, group["lr"], group["weight_decay"])

    def _step_matrices(self, partition: Tensor, rate: float, weight_decay: float) -> None:
        state, gradient = MATRIX_STATE.of(self, partition), partition.grad
        assert gradient is not None
        state[MATRIX_STATE.counter] += 1
        state["momentum"].lerp_(gradient, 1 - self.momentum)
        # In the place of the gradient, which nothing reads after the update.
        ahead = gradient.lerp_(state["momentum"], self.momentum).view(-1)
        weights = partition.view(-1)
        weights.mul_(1 - rate * weight_decay)
        dtype = self.dtype_of[partition]
        for stack in self.stacks.get(partition, []):
            shape = (stack.count, stack.rows, stack.columns)
            together = 1 if self.is_exact else _together(stack.rows * stack.columns)
            pairs = (_stacked(weights[stack.place], *shape), _stacked(ahead[stack.place], *shape))
            for own, update in zip(*(each.split(together) for each in pairs), strict=True):
                own.add_(newton_schulz(update.to(dtype, copy=True)), alpha=-rate * _factor(stack.rows, stack.columns))
        for piece in self.cut.get(partition, []):
            whole = ahead.new_zeros(piece.size)
            if not piece.fragment.is_replica:
                whole[piece.part] = ahead[piece.place]
            dist.all_reduce(whole, group=piece.owners)  # each element is one rank's: exact in any order
            if piece.length:
                joined = _stacked(whole, piece.count, piece.rows, piece.columns)
                for matrices in joined.split(1 if self.is_exact else _together(piece.rows * piece.columns)):
                    matrices.copy_(newton_schulz(matrices.to(dtype)))
                weights[piece.place].add_(whole[piece.part], alpha=-rate * _factor(piece.rows, piece.columns))


class WithholdingMuon(Withholding, _MuonAndAdamW):
    """Muon that can be told to leave a step out."""

    def own(self, fragments: Sequence[Fragment]) -> None:
        """Find the matrices in the partitions, and those that other ranks own parts of. Collective."""
        self.dtype_of = {fragment.partition: fragment.parameter.dtype for fragment in fragments}
        self.stacks, self.cut = defaultdict(list), defaultdict(list)
        pieces = [piece for fragment in fragments for piece in _pieces_of(fragment)]
        for piece, is_cut in zip(pieces, _are_cut(pieces), strict=True):
            partition = piece.fragment.partition
            if is_cut:
                self.cut[partition].append(piece)
            elif piece.length:
                stacks = self.stacks[partition]
                if stacks and stacks[-1].goes_on_with(piece):
                    place = slice(stacks.pop().place.start, piece.place.stop)
                else:
                    place = piece.place
                stacks.append(_Stack(place, piece.count, piece.rows, piece.columns))
