"""The stacked experts against a loop that calls them one row at a time."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from moe_pretrain.moe.experts import activation as activations
from moe_pretrain.moe.experts import grouped, swiglu
from moe_pretrain.moe.experts.activation import SWIGLU, Activation, activation_gradients
from moe_pretrain.moe.experts.grouped import AllRows, row_blocks
from moe_pretrain.moe.experts.swiglu import SwiGLU, SwiGLUExperts
from moe_pretrain.moe.row_layout import ExpertRowLayout
from moe_pretrain.moe.types import ExpertShard

HIDDEN, WIDTH = 8, 24  # multiples of 8, which grouped_mm wants; different, so that a swap fails

# Expert of each route by source, in any order; sources may repeat experts' company and may have no route.
LAYOUTS = {
    "two each": [[0, 1], [2, 0], [3, 1], [1, 2], [0, 3]],
    "an expert without rows": [[0, 1], [3, 0], [3, 1], [0, 1], [1, 3]],
    "ragged": [[2], [0, 1, 3], [], [3, 1], [1]],
    "one source has all": [[], [0, 1, 2, 3], []],
    "one expert has all": [[2], [2], [2]],
}


def make_order(experts_of_source: list[list[int]], num_experts: int) -> tuple[ExpertRowLayout, list[int]]:
    """The order of these routes, made by hand, and each row's expert."""
    rows = sorted((expert, source) for source, experts in enumerate(experts_of_source) for expert in experts)
    slots = max(map(len, experts_of_source), default=0)
    sources = range(len(experts_of_source))
    rows_of_source = [[row for row, (_, s) in enumerate(rows) if s == source] for source in sources]
    order = ExpertRowLayout(
        source_of_row=torch.tensor([source for _, source in rows], dtype=torch.int64),
        rows_of_source=torch.tensor(
            [own + [-1] * (slots - len(own)) for own in rows_of_source], dtype=torch.int64
        ).view(len(sources), slots),
        is_full=all(len(own) == slots for own in rows_of_source),
        rows_per_expert=torch.tensor([sum(e == expert for e, _ in rows) for expert in range(num_experts)]),
    )
    return order, [expert for expert, _ in rows]


def make_experts(dtype: torch.dtype = torch.float32, num_experts: int = 4) -> SwiGLUExperts:
    experts = SwiGLUExperts(num_experts, HIDDEN, WIDTH, ExpertShard())
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return experts.to(dtype)


def loop(
    sources: Tensor,
    weight: Tensor,
    in_weight: Tensor,
    out_weight: Tensor,
    order: ExpertRowLayout,
    expert_of_row: list[int],
    activation: Activation = SWIGLU,
) -> Tensor:
    """One row at a time, straight from the formula."""
    output = torch.zeros_like(sources)
    for row, expert in enumerate(expert_of_row):
        source = int(order.source_of_row[row])
        gate, up = (in_weight[expert] @ sources[source]).split(WIDTH)
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
        inner = (up + activation.offset) * gate * torch.sigmoid(activation.alpha * gate)
        result = weight[row] * (out_weight[expert] @ inner)
        output = output + functional.one_hot(torch.tensor(source), len(sources))[:, None] * result
    return output


@pytest.fixture(params=["weight beside", "weight in the activation"])
def side(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where backward applies a route's weight: as on a CPU, or as on CUDA."""
    monkeypatch.setattr(swiglu, "_weighs_in_activation", lambda rows: request.param != "weight beside")


def run_both(
    layout: list[list[int]], dtype: torch.dtype, activation: Activation = SWIGLU
) -> tuple[list[Tensor], list[Tensor]]:
    """Output and four gradients: ours in ``dtype``, the loop's in float64 from the same values."""
    order, expert_of_row = make_order(layout, 4)
    experts = make_experts(dtype)
    experts.activation = activation
    sources = torch.randn(len(layout), HIDDEN).to(dtype).requires_grad_()
    weight = torch.rand(len(expert_of_row), requires_grad=True)
    upstream = torch.randn(len(layout), HIDDEN).to(dtype)
    output = experts(sources, weight, order)
    leaves = [sources, weight, experts.in_weight, experts.out_weight]
    ours = [output.detach(), *torch.autograd.grad(output, leaves, upstream)]
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = loop(*doubles, order, expert_of_row, activation)
    return ours, [expected.detach(), *torch.autograd.grad(expected, doubles, upstream.double())]


@pytest.mark.usefixtures("side")
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_float32_equals_the_loop(layout: list[list[int]]) -> None:
    for value, expected in zip(*run_both(layout, torch.float32), strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.usefixtures("side")
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_bfloat16_is_within_rounding(layout: list[list[int]]) -> None:
    """Every intermediate is rounded to 8 bits: 1 % of the norm; a route weight's gradient stays float32."""
    ours, expected = run_both(layout, torch.bfloat16)
    assert [value.dtype for value in ours] == [torch.bfloat16] * 2 + [torch.float32] + [torch.bfloat16] * 2
    assert not torch.equal(ours[2], ours[2].bfloat16().float()), "rounded on the way"
    for value, reference in zip(ours, expected, strict=True):
        assert (value.double() - reference).norm() <= 0.01 * reference.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_made_in_place_are_those_of_one_kernel_to_the_bit(dtype: torch.dtype) -> None:
    before, grad_act = torch.randn(9, 2 * WIDTH).to(dtype), torch.randn(9, WIDTH).to(dtype)
    given = before.clone(), grad_act.clone()
    found = activation_gradients(before, grad_act, SWIGLU)
    for value, expected in zip(found, activations._swiglu_gradients(*given), strict=True):
        assert value.dtype == expected.dtype and torch.equal(value, expected)
    assert torch.equal(before, given[0]) and torch.equal(grad_act, given[1]), "inputs are left as they are"


@pytest.mark.usefixtures("side")
def test_another_activation_has_its_gradients_too() -> None:
    for value, expected in zip(*run_both(LAYOUTS["ragged"], torch.float32, Activation(1.702, 1.0, 0.7)), strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.usefixtures("side")
@pytest.mark.parametrize("num_sources", [0, 3])
def test_no_rows_at_all(num_sources: int) -> None:
    """Zero output and exactly zero gradients, none missing: ZeRO waits for every parameter (defect C7)."""
    order, _ = make_order([[]] * num_sources, 4)
    experts = make_experts()
    sources = torch.randn(num_sources, HIDDEN, requires_grad=True)
    weight = torch.rand(0, requires_grad=True)
    output = experts(sources, weight, order)
    leaves = [sources, weight, experts.in_weight, experts.out_weight]
    for value, like in zip([output, *torch.autograd.grad(output.sum(), leaves)], [sources, *leaves], strict=True):
        assert torch.equal(value, torch.zeros_like(like))


@pytest.mark.usefixtures("side")
def test_a_weight_of_zero_keeps_its_gradient() -> None:
    order, expert_of_row = make_order([[0, 1], [1, 2]], 4)
    experts, sources = make_experts(), torch.randn(2, HIDDEN)
    weight = torch.zeros(4, requires_grad=True)
    output = experts(sources, weight, order)
    (grad,) = torch.autograd.grad(output.sum(), [weight])
    assert torch.equal(output, torch.zeros(2, HIDDEN))
    for row, expert in enumerate(expert_of_row):
        one = SwiGLU(HIDDEN, WIDTH)
        one.load_state_dict({"in_weight": experts.in_weight[expert], "out_weight": experts.out_weight[expert]})
        torch.testing.assert_close(grad[row], one(sources[order.source_of_row[row]]).sum())


def test_output_is_summed_in_float32() -> None:
    """Two routes of nearly opposite sign cancel; rounding each to bfloat16 first would leave an error of 0.4 %."""
    order, _ = make_order([[0, 1]], 2)
    experts = make_experts(torch.bfloat16, num_experts=2)
    with torch.no_grad():
        experts.in_weight[1] = experts.in_weight[0]
        experts.out_weight[1] = -experts.out_weight[0]
    sources = torch.randn(1, HIDDEN).to(torch.bfloat16)
    first = experts(sources, torch.tensor([1.0, 0.0]), order).float()
    both = experts(sources, torch.tensor([1.0, 0.999]), order).float()
    torch.testing.assert_close(both, first * 0.001, rtol=0.01, atol=0.0)


def test_backward_twice_gives_the_same() -> None:
    order, _ = make_order(LAYOUTS["ragged"], 4)
    experts = make_experts()
    sources, weight = torch.randn(5, HIDDEN, requires_grad=True), torch.rand(7, requires_grad=True)
    output = experts(sources, weight, order).square().sum()
    leaves = [sources, weight, *experts.parameters()]
    first = torch.autograd.grad(output, leaves, retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(output, leaves), strict=True):
        assert torch.equal(one, other)


def test_saves_only_sources_preactivation_and_weights() -> None:
    experts = make_experts()
    tokens, top_k = 64, 2
    order, _ = make_order([[t % 4, (t + 1) % 4] for t in range(tokens)], 4)
    sources, weight = torch.randn(tokens, HIDDEN, requires_grad=True), torch.rand(tokens * top_k, requires_grad=True)
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        experts(sources, weight, order)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in experts.parameters()}
    elements = sum(t.untyped_storage().nbytes() // 4 for key, t in saved.items() if key not in parameters)
    assert elements == tokens * HIDDEN + tokens * top_k * (2 * WIDTH + 1)


def test_grouped_products_equal_one_expert_at_a_time() -> None:
    """The path of CUDA runs on a CPU too: ``grouped_mm`` in bfloat16, an empty expert first and in the middle."""
    counts = torch.tensor([0, 5, 0, 3])
    left, right = torch.randn(8, 16).bfloat16(), torch.randn(8, HIDDEN).bfloat16()
    matrices = torch.randn(4, 16, HIDDEN).bfloat16()
    grouped = AllRows(counts)
    blocks = row_blocks(counts, torch.bfloat16)
    assert [block.rows for block in blocks] == [slice(0, 0), slice(0, 5), slice(5, 5), slice(5, 8)]
    stack = None
    for block in blocks:
        torch.testing.assert_close(grouped.times(right, matrices)[block.rows], block.times(right[block.rows], matrices))
        torch.testing.assert_close(
            grouped.times_transposed(left, matrices)[block.rows], block.times_transposed(left[block.rows], matrices)
        )
        stack = block.outer(left[block.rows], right[block.rows], stack)
    torch.testing.assert_close(grouped.outer(left, right, None), stack)


@pytest.mark.parametrize("path", ["one expert at a time", "grouped"])
def test_outer_of_an_empty_expert_is_exactly_zero(path: str) -> None:
    """The stack is made of uninitialised memory, which the tests' deterministic mode fills with NaN."""
    counts = torch.tensor([0, 5, 0, 3])
    left, right = torch.randn(8, 16).bfloat16(), torch.randn(8, HIDDEN).bfloat16()
    stack = None
    for block in [AllRows(counts)] if path == "grouped" else row_blocks(counts, torch.bfloat16):
        stack = block.outer(left[block.rows], right[block.rows], stack)
    assert stack is not None
    assert stack.isfinite().all()
    for expert, count in enumerate(counts.tolist()):
        assert bool(stack[expert].any()) == (count > 0)


def score_loop(
    sources: Tensor,
    query: Tensor,
    key_weight: Tensor,
    in_weight: Tensor,
    order: ExpertRowLayout,
    expert_of_row: list[int],
) -> Tensor:
    """One row at a time: the query times the key that is made of the expert's activation."""
    scores = [sources.sum()[None][:0]]
    for row, expert in enumerate(expert_of_row):
        source = int(order.source_of_row[row])
        gate, up = (in_weight[expert] @ sources[source]).split(WIDTH)
        scores.append((query[source] @ (key_weight @ (functional.silu(gate) * up)))[None])
    return torch.cat(scores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [*LAYOUTS.values(), [[], []]], ids=[*LAYOUTS.keys(), "no rows"])
def test_scores_equal_the_loop_with_gradients(layout: list[list[int]], dtype: torch.dtype) -> None:
    order, expert_of_row = make_order(layout, 4)
    experts = make_experts(dtype)
    sources = torch.randn(len(layout), HIDDEN).to(dtype).requires_grad_()
    query, key_weight = torch.randn(len(layout), 6, requires_grad=True), torch.randn(6, WIDTH, requires_grad=True)
    upstream = torch.randn(len(expert_of_row))
    scores = experts.scores(sources, query, key_weight, order)
    leaves = [sources, query, key_weight, experts.in_weight]
    ours = [scores, *torch.autograd.grad(scores, leaves, upstream)]
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = score_loop(*doubles, order, expert_of_row)
    gradients = torch.autograd.grad((expected * upstream.double()).sum(), doubles, materialize_grads=True)
    assert [value.dtype for value in ours] == [torch.float32, dtype, torch.float32, torch.float32, dtype]
    for value, reference in zip(ours, [expected, *gradients], strict=True):
        error, size = (value.double() - reference).norm(), reference.norm()
        assert error <= (1e-6 if dtype == torch.float32 else 0.01) * size


def test_scores_save_only_sources_factors_and_preactivations() -> None:
    experts = make_experts()
    tokens, slots, key = 64, 3, 6
    order, _ = make_order([[t % 4, (t + 1) % 4, (t + 2) % 4] for t in range(tokens)], 4)
    sources, query = torch.randn(tokens, HIDDEN, requires_grad=True), torch.randn(tokens, key, requires_grad=True)
    key_weight = torch.randn(key, WIDTH, requires_grad=True)
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        experts.scores(sources, query, key_weight, order)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in [*experts.parameters(), key_weight]}
    elements = sum(t.untyped_storage().nbytes() // 4 for at, t in saved.items() if at not in parameters)
    assert elements == tokens * (HIDDEN + key + WIDTH) + tokens * slots * 2 * WIDTH


def test_empty_experts_get_zero_gradients_where_the_kernel_writes_none(monkeypatch: pytest.MonkeyPatch):
    """Blackwell's grouped product leaves what memory held for an expert without rows; played with NaN on the CPU."""
    rows_per_expert = torch.tensor([3, 0, 2, 0])
    left, right = torch.randn(5, 8).bfloat16(), torch.randn(5, 16).bfloat16()
    products = functional.grouped_mm
    parts = zip(left.split([3, 0, 2, 0]), right.split([3, 0, 2, 0]), strict=True)
    expected = torch.stack([part.t() @ other for part, other in parts])

    def unwritten(*operands: Tensor, offs: Tensor) -> Tensor:
        result = products(*operands, offs=offs)
        result[rows_per_expert == 0] = torch.nan
        return result

    monkeypatch.setattr(functional, "grouped_mm", unwritten)
    for is_blackwell in (True, False):
        monkeypatch.setattr(grouped, "_leaves_empty_products", lambda device, found=is_blackwell: found)
        stack = grouped.AllRows(rows_per_expert).outer(left, right, None)
        assert stack.isfinite().all() == is_blackwell
        if is_blackwell:
            torch.testing.assert_close(stack.float(), expected.float(), rtol=1e-2, atol=1e-2)
            assert (stack[rows_per_expert == 0] == 0).all()


@pytest.mark.parametrize("capability,leaves", [((9, 0), False), ((10, 0), True), ((12, 0), True)])
def test_which_devices_leave_them(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], leaves: bool):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert grouped._leaves_empty_products.__wrapped__(torch.device("cuda", 0)) == leaves
    assert not grouped._leaves_empty_products.__wrapped__(torch.device("cpu"))
