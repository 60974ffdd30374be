"""The clock of the parts of a MoE layer, where time is tensor operations and steps of an exchange."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers.builders import tiny
from helpers.routing import make_context
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_pretrain.model.attention import Attention, document_mask
from moe_pretrain.model.rotary import rotary_table
from moe_pretrain.moe.build import build_moe_layer
from moe_pretrain.moe.layer import MoELayer
from moe_pretrain.moe.part_timer import (
    PARTS,
    CudaTime,
    HostTime,
    PartClock,
    part,
    time_source,
)
from moe_pretrain.moe.types import ExpertShard

TOKENS, HIDDEN, EXPERTS = 10, 16, 4


class Steps(HostTime):
    """A second passes with each ``pass_by``."""

    def __init__(self) -> None:
        self.passed = 0.0

    def now(self) -> float:
        return self.passed

    def pass_by(self, seconds: float = 1.0) -> None:
        self.passed += seconds


class Operations(TorchDispatchMode, Steps):
    """A second passes with each tensor operation, or each of one name only."""

    def __init__(self, name: str = ""):
        TorchDispatchMode.__init__(self)
        Steps.__init__(self)
        self._name = name

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._name in ("", operation.overloadpacket.__name__):
            self.pass_by()
        return operation(*args, **(kwargs or {}))


class LoopBack:
    """An exchange with nobody else; a second passes with each thing it does, as ``steps`` has it."""

    size = 1

    def __init__(self, steps: Steps | None = None):
        self._steps = steps or Steps()

    def exchange_counts(self, counts: Tensor) -> Tensor:
        self._steps.pass_by()
        return counts

    def start(self, rows: list[Tensor], send: list[int], receive: list[int]) -> "LoopBack":
        self._steps.pass_by()
        self.rows = rows
        return self

    def wait(self) -> list[Tensor]:
        self._steps.pass_by()
        return self.rows


def make_layer(scheme: str, *overrides: str) -> MoELayer:
    """Four experts, two for each token, and one shared expert."""
    words = {"autonomy": ["router.gate_rank=8"], "attentive": ["router.num_candidates=3", "router.key_size=6"]}
    config = tiny(f"router={scheme}", "model.moe.num_shared_experts=1", *words.get(scheme, ()), *overrides)
    layer = build_moe_layer(config.model.moe, config.router, HIDDEN, 0, ExpertShard())
    assert isinstance(layer, MoELayer)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer.eval()


def measure(layer: MoELayer, source: Steps) -> dict[str, float]:
    """Seconds of the parts of one forward pass, those that took any."""
    hidden, context = torch.randn(TOKENS, HIDDEN), make_context(TOKENS)
    with PartClock(source) as clock, torch.no_grad(), source if isinstance(source, Operations) else nullcontext():
        layer(hidden, context, False)
        clock.end_batch(1)
    (batch,) = clock.batches
    assert tuple(batch) == PARTS
    return {name: seconds for name, seconds in batch.items() if seconds}


def test_the_time_of_an_inner_part_is_not_the_outer_ones():
    steps = Steps()
    with PartClock(steps) as clock:
        steps.pass_by(1000)  # before, between and after parts: nobody's
        with part("router"):
            steps.pass_by(1)
        steps.pass_by(1000)
        with part("experts"):
            steps.pass_by(2)
            with part("permute"):
                steps.pass_by(3)
                with part("experts"):
                    steps.pass_by(4)
                steps.pass_by(5)
            steps.pass_by(6)
            with part("combine"):
                steps.pass_by(7)
        steps.pass_by(1000)
        clock.end_batch(4)
        steps.pass_by(1000)
        with part("router"):
            steps.pass_by(50)
        clock.end_batch(5)
        clock.end_batch(5)
    nothing = dict.fromkeys(PARTS, 0.0)
    assert clock.batches == [
        nothing | {"router": 1 / 4, "experts": 12 / 4, "permute": 8 / 4, "combine": 7 / 4},
        nothing | {"router": 10.0},
    ], "per token; a batch in which no part has run is none"


def test_no_clock_hears_of_what_runs_outside_of_it():
    before = part("router")
    with before, part("experts"), before:
        pass
    assert before is part("combine"), "nothing is made"
    steps = Steps()
    with PartClock(steps) as outer:
        with pytest.raises(KeyError), PartClock(steps) as inner:
            with part("router"):
                steps.pass_by()
                raise KeyError
        with part("experts"):
            steps.pass_by()
    with part("permute"):
        steps.pass_by()
    for clock, name in ((outer, "experts"), (inner, "router")):
        clock.end_batch(1)
        assert [each for each, seconds in clock.batches[0].items() if seconds] == [name]


EXPERT_PRODUCTS = {
    "top_k": 2,
    "autonomy": 3,
    "attentive": 2,
}  # a factorised gate is two, the first of them in the router
ROUTER_PRODUCTS = {"top_k": 1, "autonomy": 1, "attentive": 3 + EXPERTS}  # logits, query, factor, first layers asked


@pytest.mark.parametrize("exchanged", [False, True])
@pytest.mark.parametrize("scheme", EXPERT_PRODUCTS)
def test_products_are_of_the_router_and_of_experts(scheme: str, exchanged: bool):
    layer = make_layer(scheme)
    layer.exchange = LoopBack() if exchanged else None
    products = {"router": ROUTER_PRODUCTS[scheme], "experts": EXPERTS * EXPERT_PRODUCTS[scheme], "shared_experts": 2}
    assert measure(layer, Operations("mm")) == products


def test_a_gate_that_is_computed_again_is_of_the_experts():
    layer = make_layer("autonomy", "router.gate_activation=recomputed")
    assert measure(layer, Operations("mm")) == {"router": 1, "experts": EXPERTS * 4, "shared_experts": 2}
    assert measure(layer, Operations("index_select")) == {"router": 1, "permute": 2 * EXPERTS + 1, "combine": 4}


@pytest.mark.parametrize("exchanged", [False, True])
@pytest.mark.parametrize("scheme", EXPERT_PRODUCTS)
def test_rows_are_copied_in_permute_and_combine(scheme: str, exchanged: bool):
    """An expert gathers its rows; a token gathers two outputs and their weights. What is asked is the router's."""
    layer = make_layer(scheme)
    layer.exchange = LoopBack() if exchanged else None
    # Exchanged: gathered to be sent, and one that repeat_interleave makes to order what came. For asking, with a query.
    sent = 2 if exchanged else 0
    asked = {"router": EXPERTS * 2 + sent + exchanged} if scheme == "attentive" else {}
    if scheme == "autonomy":  # weights and first activations of the experts that are taken
        asked = {"router": 2}
    # Exchanged: weighted where the expert is, before a token gathers two outputs.
    # Weights, and what autonomy's tokens take along, are put in order of rows, where they leave and where they come.
    ordered = (2 if scheme == "autonomy" else 1) * (2 if exchanged else 1)
    expected = asked | {"permute": EXPERTS + sent + ordered, "combine": 2 + 2 if exchanged else 2 * 2}
    assert measure(layer, Operations("index_select")) == expected


@pytest.mark.parametrize("scheme", ["top_k", "autonomy"])
def test_what_the_shared_experts_say_is_added_in_combine(scheme: str):
    times = measure(make_layer(scheme), Operations("add"))
    assert times.pop("combine") == 1 and times.keys() <= {"router"}


@pytest.mark.parametrize("by_sender", [False, True])
@pytest.mark.parametrize("scheme", EXPERT_PRODUCTS)
def test_the_exchange_is_of_routes_and_one_to_ask_is_the_routers(scheme: str, by_sender: bool):
    """Counts, then start and wait, there and back."""
    layer, steps = make_layer(scheme), Steps()
    layer.exchange = LoopBack(steps)
    layer.experts_of_sender = (lambda sender: layer.experts) if by_sender else None
    assert measure(layer, steps) == {"exchange": 5} | ({"router": 5} if scheme == "attentive" else {})


@pytest.mark.parametrize("exchanged", [False, True])
@pytest.mark.parametrize("scheme", EXPERT_PRODUCTS)
def test_all_that_a_layer_does_is_in_a_part(scheme: str, exchanged: bool):
    layer, source = make_layer(scheme), Operations()
    layer.exchange = LoopBack(source) if exchanged else None
    times = measure(layer, source)
    assert sum(times.values()) == source.passed
    assert times.keys() == {*PARTS} - (set() if exchanged else {"exchange"})


def test_the_statistic_of_attention_is_the_routers():
    attention = Attention(HIDDEN, 2, 2, 8)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter)
    hidden, position = torch.randn(2, 6, HIDDEN), torch.arange(6).expand(2, -1)
    mask, rotary = document_mask(torch.zeros(2, 6, dtype=torch.int64)), rotary_table(position, 8, 10_000.0)
    with Operations("softmax") as source, PartClock(source) as clock, torch.no_grad():
        attention(hidden, rotary, mask, None)
        clock.end_batch(1)
        assert clock.batches == []
    with Operations() as source, PartClock(source) as clock, torch.no_grad():
        attention(hidden, rotary, mask, "row_max")
        clock.end_batch(1)
    assert [name for name, seconds in clock.batches[0].items() if seconds] == ["router"]


@pytest.mark.parametrize("scheme", EXPERT_PRODUCTS)
def test_a_clock_changes_no_number_and_may_run_while_experts_are_recomputed(scheme: str):
    layer, hidden = make_layer(scheme), torch.randn(TOKENS, HIDDEN)

    def run(clocked: bool) -> list[Tensor]:
        layer.zero_grad()
        given = hidden.clone().requires_grad_()
        clock = PartClock(HostTime())
        with clock if clocked else nullcontext():
            output = layer(given, make_context(TOKENS), True)
            (output.hidden.square().sum() + sum(output.aux.values())).backward()
        clock.end_batch(1)
        assert len(clock.batches) == clocked
        return [output.hidden, given.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]

    for off, on in zip(run(False), run(True), strict=True):
        assert torch.equal(off, on)


def test_the_host_times_a_cpu_and_events_a_cuda_device(monkeypatch: pytest.MonkeyPatch):
    """Events are recorded as the work is launched, waited for once, and in milliseconds."""
    told: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            self.at = len(told) ** 2
            told.append(("record", self.at))

        def synchronize(self) -> None:
            told.append(("wait", self.at))

        def elapsed_time(self, later: "Event") -> float:
            return 1000.0 * (later.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    source = time_source("cuda")
    assert isinstance(source, CudaTime) and type(time_source("cpu")) is HostTime
    with PartClock(source) as clock:
        with part("experts"):  # from 0
            with part("permute"):  # from 1
                pass  # to 4
        clock.end_batch(1)  # to 9
    assert told == [("record", 0), ("record", 1), ("record", 4), ("record", 9), ("wait", 9)]
    assert clock.batches == [dict.fromkeys(PARTS, 0.0) | {"experts": 1.0 + 5.0, "permute": 3.0}]
