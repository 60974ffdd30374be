"""Muon for the matrices of hidden layers, each expert's by itself; AdamW for everything else."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field, PositiveFloat
from torch import Tensor

from moe_pretrain.engine.newton_schulz import newton_schulz, newton_schulz_flops
from moe_pretrain.engine.optimizers.base import Fragment, OptimizerConfig, OptimizerState, Withholding
from moe_pretrain.model.decoder import DecoderLM, ModelConfig
from moe_pretrain.model.parameter_groups import ParameterRole, meta_model, parameter_roles
from moe_pretrain.moe.routers.base import RouterConfig

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
    experts are matrices of their own. Embedding, output head, norms, all of a router, and what is no matrix have AdamW
    with the same rate and decay: the factor gives both updates the same root mean square.

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
        matrices = _all_matrices(meta_model(model, router))
        return sum(count * newton_schulz_flops(rows, columns) for count, rows, columns in matrices)

    def update_bytes(self, model: DecoderLM) -> float:
        """Of the largest batch of matrices, at most float32."""
        numbers = [(count, rows * columns) for count, rows, columns in _all_matrices(model)]
        return 4.0 * _WORKSPACE * max((min(count, _together(each)) * each for count, each in numbers), default=0)

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
        """Raise if all that would be learnt, or the experts, are not for Muon."""
        if self.trainable == "routers":
            raise ValueError(
                "optimizer.trainable=routers must be all with optimizer.name=muon, which is not for routers"
            )
        for name, role in parameter_roles(model).items():
            parameter = model.get_parameter(name)
            if ".experts." in name and parameter.ndim > 1 and role.group == "experts" and not role.rows:
                kind = type(model.get_submodule(name.rpartition(".")[0])).__name__
                raise ValueError(
                    f"optimizer.name=muon must be adamw with such experts: {kind} has no matrices that lie one "
                    "after the other for Muon to take by themselves"
                )


@dataclass(frozen=True)
class _Matrix:
    """One matrix of a parameter, and the part of it that this rank owns, which may be nothing.

    Attributes:
        fragment: The parameter, and what this rank owns of it.
        first: First element in the flat parameter.
        rows: Its rows.
        columns: Its columns.
    """

    fragment: Fragment
    first: int
    rows: int
    columns: int

    @property
    def part(self) -> slice:
        """Elements that this rank owns, in the flat matrix."""
        begin = max(self.fragment.start - self.first, 0)
        end = min(self.fragment.start + self.fragment.length - self.first, self.rows * self.columns)
        return slice(begin, max(begin, end))

    @property
    def length(self) -> int:
        """Number of elements that this rank owns."""
        return self.part.stop - self.part.start

    @property
    def place(self) -> slice:
        """Place of these elements in the partition."""
        begin = self.fragment.partition_start + self.first + self.part.start - self.fragment.start
        return slice(begin, begin + self.length)


@dataclass(frozen=True)
class _Stack:
    """Whole matrices of one shape that lie one after the other in a partition."""

    place: slice
    rows: int
    columns: int

    def goes_on_with(self, matrix: _Matrix) -> bool:
        """Whether ``matrix`` is the next one."""
        return (self.place.stop, self.rows, self.columns) == (matrix.place.start, matrix.rows, matrix.columns)


def _matrices_of(fragment: Fragment) -> Iterator[_Matrix]:
    first = 0
    for count, rows, columns in fragment.role.matrices(fragment.parameter):
        for _ in range(count):
            yield _Matrix(fragment, first, rows, columns)
            first += rows * columns


def _are_cut(matrices: Sequence[_Matrix]) -> list[bool]:
    """Of each matrix, whether some rank owns a part of it that is not all. Collective, where there are ranks."""
    found = [False] * len(matrices)
    if not dist.is_initialized():
        return found
    for owners in dict.fromkeys(matrix.fragment.owners for matrix in matrices):
        own = [index for index, matrix in enumerate(matrices) if matrix.fragment.owners is owners]
        parts = [0 < matrices[index].length < matrices[index].rows * matrices[index].columns for index in own]
        flags = torch.tensor(parts, dtype=torch.int32, device=matrices[own[0]].fragment.partition.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=owners)
        for index, flag in zip(own, flags.tolist(), strict=True):
            found[index] = bool(flag)
    return found


def _all_matrices(model: DecoderLM) -> Iterator[tuple[int, int, int]]:
    for name, role in parameter_roles(model).items():
        yield from role.matrices(model.get_parameter(name))


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
    cut: Mapping[Tensor, list[_Matrix]]
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
            shape = (-1, stack.rows, stack.columns)
            together = 1 if self.is_exact else _together(stack.rows * stack.columns)
            pairs = (weights[stack.place].view(shape), ahead[stack.place].view(shape))
            for own, update in zip(*(each.split(together) for each in pairs), strict=True):
                own.add_(newton_schulz(update.to(dtype, copy=True)), alpha=-rate * _factor(stack.rows, stack.columns))
        for matrix in self.cut.get(partition, []):
            whole = ahead.new_zeros(matrix.rows * matrix.columns)
            whole[matrix.part] = ahead[matrix.place]
            dist.all_reduce(whole, group=matrix.fragment.owners)  # each element is one rank's: exact in any order
            if matrix.length:
                update = newton_schulz(whole.view(1, matrix.rows, matrix.columns).to(dtype)).flatten()
                weights[matrix.place].add_(update[matrix.part], alpha=-rate * _factor(matrix.rows, matrix.columns))


class WithholdingMuon(Withholding, _MuonAndAdamW):
    """Muon that can be told to leave a step out."""

    def own(self, fragments: Sequence[Fragment]) -> None:
        """Find the matrices in the partitions, and those that other ranks own parts of. Collective."""
        self.dtype_of = {fragment.partition: fragment.parameter.dtype for fragment in fragments}
        self.stacks, self.cut = defaultdict(list), defaultdict(list)
        matrices = [matrix for fragment in fragments for matrix in _matrices_of(fragment)]
        for matrix, is_cut in zip(matrices, _are_cut(matrices), strict=True):
            partition = matrix.fragment.partition
            if is_cut:
                self.cut[partition].append(matrix)
            elif matrix.length:
                stacks = self.stacks[partition]
                if stacks and stacks[-1].goes_on_with(matrix):
                    place = slice(stacks.pop().place.start, matrix.place.stop)
                else:
                    place = matrix.place
                stacks.append(_Stack(place, matrix.rows, matrix.columns))
