"""SwiGLU experts whose matrices are products of small cores, of which all experts share the central one."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moe_pretrain.moe.counter_noise import counter_uniform
from moe_pretrain.moe.experts.activation import SWIGLU, Activation
from moe_pretrain.moe.experts.config import MatrixProductConfig
from moe_pretrain.moe.experts.swiglu import run_swiglu_experts
from moe_pretrain.moe.row_layout import ExpertRowLayout
from moe_pretrain.moe.types import Experts, ExpertShard, RoutingContext

DROPOUT_STREAM = 9
MATRICES = ("gate", "up", "out")


class MatrixProductExperts(nn.Module):
    """This rank's experts as cores; their matrices are rebuilt in every forward pass.

    Core ``m`` of ``n`` is ``T_m [D_m, i_m, j_m, D_(m+1)]`` with ``D_0 = D_n = 1``; an entry of a matrix is the product
    of the matrices ``T_m[:, i_m, j_m, :]``, where ``(i_1 .. i_n)`` and ``(j_1 .. j_n)`` are the digits of row and
    column, the first the most significant. Of each of the three matrices (gate and up ``[width, hidden]``, out
    ``[hidden, width]``) the central core is one tensor for all experts of the layer, the others are each expert's own.

    ``NAME_shared`` is the same on every rank: its gradient is the sum over all ranks' experts and tokens, as for any
    dense parameter, whatever the expert-parallel size. ``NAME_core_M [local_experts, ...]`` are sharded like experts of
    other kinds.

    Source:
        Gao et al. 2022 (arXiv:2203.01104), sections 3.1 and 3.2; there for two matrices with ReLU or GELU, which start
        as the decomposition of a trained network.
    """

    expert_axis = 0
    """Of ``in_weight``."""
    dense_names = tuple(f"{name}_shared" for name in MATRICES)

    def __init__(
        self,
        config: MatrixProductConfig,
        num_experts: int,
        hidden_size: int,
        width: int,
        shard: ExpertShard,
        activation: Activation = SWIGLU,
    ):
        super().__init__()
        self.activation = activation
        self.expert_ids = shard.local_experts(num_experts)
        self.shapes = {name: core_shapes(config, *size) for name, size in matrix_sizes(hidden_size, width).items()}
        self.centre = config.num_cores // 2
        self.shared_gradient_dropout = config.shared_gradient_dropout
        local = len(self.expert_ids)
        for name, shapes in self.shapes.items():
            for index, shape in enumerate(shapes):
                if index == self.centre:
                    self.register_parameter(f"{name}_shared", nn.Parameter(torch.empty(shape)))
                else:
                    self.register_parameter(f"{name}_core_{index}", nn.Parameter(torch.empty(local, *shape)))

    def cores(self, name: str) -> list[Tensor]:
        """All cores of a matrix, from left to right."""
        places = range(len(self.shapes[name]))
        return [self.get_parameter(f"{name}_shared" if m == self.centre else f"{name}_core_{m}") for m in places]

    def weights(self, keep_shared: bool = True) -> tuple[Tensor, Tensor]:
        """``[local_experts, 2 * width, hidden]`` and ``[local_experts, hidden, width]``, as ``SwiGLUExperts`` has them.

        Args:
            keep_shared: Whether the shared cores get a gradient; else one of zero.
        """
        rebuilt = {}
        for name in MATRICES:
            cores = self.cores(name)
            if not keep_shared:
                shared = cores[self.centre]
                cores[self.centre] = shared.detach() + 0 * shared
            rebuilt[name] = rebuild(cores, self.centre)
        return torch.cat([rebuilt["gate"], rebuilt["up"]], dim=1), rebuilt["out"]

    @property
    def in_weight(self) -> Tensor:
        """The rebuilt gates and up matrices."""
        return self.weights()[0]

    @property
    def out_weight(self) -> Tensor:
        """The rebuilt out matrices."""
        return self.weights()[1]

    def forward(
        self,
        sources: Float[Tensor, "sources hidden"],
        weight: Float[Tensor, "rows"],
        order: ExpertRowLayout,
        payload: None = None,
        keep_shared: bool = True,
    ) -> Float[Tensor, "sources hidden"]:
        """As ``SwiGLUExperts``, with the rebuilt matrices."""
        return self.rebuilt(keep_shared)(sources, weight, order, payload)

    def rebuilt(self, keep_shared: bool = True) -> Experts:
        """The experts with matrices that are rebuilt once, however often they are called."""
        matrices = self.weights(keep_shared)

        def experts(sources: Tensor, weight: Tensor, order: ExpertRowLayout, payload: Tensor | None = None) -> Tensor:
            return run_swiglu_experts(sources, weight, *matrices, order, self.activation)

        return experts

    def options(self, context: RoutingContext, layer: int) -> dict[str, bool]:
        """Arguments of a training step: whether the shared cores get a gradient, drawn alike on every rank."""
        if self.shared_gradient_dropout == 0:
            return {}
        keys = (context.seed, DROPOUT_STREAM, context.step, layer)
        drawn = counter_uniform(torch.zeros(1, dtype=torch.int64), 1, *keys)
        return {"keep_shared": bool(drawn >= self.shared_gradient_dropout)}

    def start_std(self, parameter: str, target: float) -> float:
        """Standard deviation with which a core starts, so that its matrix's entries have ``target``.

        Sums over a bond have as many terms as the bond is wide; the cores beside the central one make products of
        variance 1, and the central one has what is left.
        """
        name, _, place = parameter.partition("_")
        shapes = self.shapes[name]
        if place == "shared":
            before, *_, behind = shapes[self.centre]
            return target / math.sqrt(before * behind)
        shape = shapes[int(place.removeprefix("core_"))]
        return 1 / math.sqrt(shape[0] if int(place.removeprefix("core_")) < self.centre else shape[-1])


def rebuild(cores: Sequence[Tensor], centre: int) -> Float[Tensor, "local_experts rows columns"]:
    """The matrices of all experts from their cores, the one at ``centre`` without an expert axis."""
    left, right = cores[0][:, 0], cores[-1][..., 0]  # [experts, rows, columns, bond], [experts, bond, rows, columns]
    for core in cores[1:centre]:
        left = torch.einsum("eijb,ebkld->eikjld", left, core).flatten(1, 2).flatten(2, 3)
    for core in reversed(cores[centre + 1 : -1]):
        right = torch.einsum("ebkld,edij->ebkilj", core, right).flatten(2, 3).flatten(3, 4)
    inner = torch.einsum("eijb,bkld->eikjld", left, cores[centre]).flatten(1, 2).flatten(2, 3)
    return torch.einsum("eijd,edkl->eikjl", inner, right).flatten(1, 2).flatten(2, 3)


def matrix_sizes(hidden_size: int, width: int) -> dict[str, tuple[int, int]]:
    """Rows and columns of an expert's matrices."""
    return {"gate": (width, hidden_size), "up": (width, hidden_size), "out": (hidden_size, width)}


def factors(size: int, count: int) -> list[int]:
    """``size`` as ``count`` factors, as equal as its primes allow, large ones in the middle.

    768, 3072, 1024 and 4096 come out as in the released code: (3, 4, 4, 4, 4), (4, 4, 8, 6, 4), (4, 4, 4, 4, 4) and
    (4, 4, 8, 8, 4).
    """
    primes, rest = [], size
    for divisor in range(2, math.isqrt(size) + 1):
        while rest % divisor == 0:
            primes.append(divisor)
            rest //= divisor
    if rest > 1:
        primes.append(rest)
    found = [1] * count
    for prime in sorted(primes, reverse=True):
        found[found.index(min(found))] *= prime
    # From the middle outwards, first to the right.
    places = sorted(range(count), key=lambda place: (abs(place - count // 2), -place))
    arranged = dict(zip(places, sorted(found, reverse=True), strict=True))
    return [arranged[place] for place in range(count)]


def bonds(rows: Sequence[int], columns: Sequence[int], truncation: int | None) -> list[int]:
    """Widths between cores, and 1 at both ends: as wide as either side can fill, at most ``truncation``."""
    sizes = [row * column for row, column in zip(rows, columns, strict=True)]
    full = [min(math.prod(sizes[:m]), math.prod(sizes[m:])) for m in range(len(sizes) + 1)]
    return full if truncation is None else [min(bond, truncation) for bond in full]


def core_shapes(config: MatrixProductConfig, rows: int, columns: int) -> list[tuple[int, int, int, int]]:
    """Shapes of a matrix's cores, from left to right."""
    of_rows, of_columns = factors(rows, config.num_cores), factors(columns, config.num_cores)
    widths = bonds(of_rows, of_columns, config.truncation)
    return list(zip(widths[:-1], of_rows, of_columns, widths[1:], strict=True))


def core_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a core as the linear map by which it acts on an input.

    Applied core by core from the right, ``T_m`` takes the digit ``j_m`` of the input and the bond behind it to the
    digit ``i_m`` of the output and the bond before it: ``[D_m i_m, j_m D_(m+1)]``, which is how it lies in memory. One
    row or one column, where a size has no factor left for it, makes it a vector.
    """
    before, row, column, behind = shape
    return before * row, column * behind


def check_matrix_product(config: MatrixProductConfig, hidden_size: int, width: int) -> None:
    """Raise ``ValueError`` if ``truncation`` cuts nothing: a number that has no effect."""
    whole = bonds(factors(width, config.num_cores), factors(hidden_size, config.num_cores), None)
    if config.truncation is not None and config.truncation >= max(whole):
        raise ValueError(
            f"model.moe.experts.truncation={config.truncation} must be below {max(whole)}, the widest bond of a matrix "
            f"of {width} by {hidden_size}; null for none"
        )


def core_parameters(config: MatrixProductConfig, hidden_size: int, width: int) -> tuple[int, int]:
    """Parameters of one layer that all experts share, and those of one expert."""
    shared = own = 0
    for rows, columns in matrix_sizes(hidden_size, width).values():
        sizes = [math.prod(shape) for shape in core_shapes(config, rows, columns)]
        shared += sizes[config.num_cores // 2]
        own += sum(sizes) - sizes[config.num_cores // 2]
    return shared, own


def rebuild_flops(config: MatrixProductConfig, hidden_size: int, width: int) -> float:
    """FLOPs of rebuilding one expert's matrices once, forward."""
    total, centre = 0.0, config.num_cores // 2
    for rows, columns in matrix_sizes(hidden_size, width).values():
        shapes = core_shapes(config, rows, columns)
        entries = [shape[1] * shape[2] for shape in shapes]
        # Entries of each product times the bond that is summed over; a bond of 1 is no matrix product.
        products = [(math.prod(entries[: m + 1]) * shapes[m][3], shapes[m][0]) for m in range(1, centre + 1)]
        products += [(math.prod(entries[m:]) * shapes[m][0], shapes[m][3]) for m in range(centre + 1, len(shapes) - 1)]
        products.append((math.prod(entries), shapes[centre][3]))
        total += sum(2.0 * made * bond for made, bond in products if bond > 1)
    return total


def rebuilt_numbers(config: MatrixProductConfig, hidden_size: int, width: int) -> int:
    """Numbers that backward needs of one expert's matrices: the matrices, and products of cores on the way to them."""
    total, centre = 0, config.num_cores // 2
    for rows, columns in matrix_sizes(hidden_size, width).values():
        shapes = core_shapes(config, rows, columns)
        entries = [shape[1] * shape[2] for shape in shapes]
        total += rows * columns
        total += sum(math.prod(entries[: m + 1]) * shapes[m][3] for m in range(1, centre + 1))
        total += sum(math.prod(entries[m:]) * shapes[m][0] for m in range(centre + 1, len(shapes) - 1))
    return total
