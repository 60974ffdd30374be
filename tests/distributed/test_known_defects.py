"""Rows of the table of known defects that need several ranks; each test is named by its row.

All runs are made by one start of four processes, then every test looks at its own results. Rows for one process are in
``tests/unit/test_known_defects.py``. Row C22 (a bias that balances
without a loss) is in ``test_router_state.py`` and ``tests/unit/moe/test_loss_free.py``.
"""

import math
import traceback
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from helpers.builders import WITH_ALL_PARTS, context_of, random_batches, tiny
from helpers.processes import run_on_ranks
from torch import Tensor
from torch.nn import functional

from moe_pretrain.config.preflight import plan_run
from moe_pretrain.config.schema import Config
from moe_pretrain.data.rows.micro_batch import IGNORE_INDEX
from moe_pretrain.engine.sanity import SanityError, check_replicas, checksum
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.moe.dispatch import run_experts
from moe_pretrain.moe.row_layout import ExpertRowLayout
from moe_pretrain.moe.types import RouterUse, Routing
from moe_pretrain.parallel.deepspeed_moe import expert_groups, is_expert
from moe_pretrain.parallel.exchange import ROW_ALIGNMENT_BYTES, AllToAll
from moe_pretrain.parallel.mesh import build_mesh
from moe_pretrain.schedule.batch_plan import plan_batches
from moe_pretrain.verify.oracle import Oracle
from moe_pretrain.verify.verify import build_engine, own_micro_batches, record

pytestmark = pytest.mark.slow  # a minute of one start; the fast set has parity's cases
RANKS = 4
Result = dict[str, Any]


# What the ranks do. Every function returns plain values; the tests below judge them.


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def _train(
    config: Config,
    num_steps: int = 1,
    change_model: Callable[[DecoderLM], None] | None = None,
    change_batches: Callable[[list], list] | None = None,
    with_oracle: bool = True,
) -> Result:
    """Train some steps, beside the oracle; ``batches`` of a step may be changed before either sees them."""
    mesh = build_mesh(config.parallel, "cpu")
    plan = plan_batches(config.batch, config.model.sequence_length, mesh.world_size, config.num_steps)
    steps = random_batches(config, mesh.world_size)[:num_steps]
    if change_batches is not None:
        steps = [change_batches(step) for step in steps]
    engine = build_engine(config, plan_run(config, mesh.world_size, ("cpu", config.engine.dtype)), mesh, change_model)
    initial = {name: weight.clone() for name, weight in engine.master_weights().items()}
    run = [record(engine, i, own_micro_batches(step, plan, mesh.rank)) for i, step in enumerate(steps)]
    expected = None
    if with_oracle:
        expected = mesh.on_main(lambda: Oracle(config, plan.num_steps, config.engine.dtype, change_model).run(steps))
    return {"run": run, "oracle": expected, "initial": initial, "engine": engine, "steps": steps}


def _ep(size: int, *overrides: str) -> tuple[str, ...]:
    return (f"parallel.processes={RANKS}", f"parallel.expert_parallel_size={size}", *overrides)


def _no_clipping(*overrides: str) -> tuple[str, ...]:
    return ("engine.gradient_clipping=0", *overrides)


def _everyone(value: Any) -> list[Any]:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def _starve(model: DecoderLM) -> None:
    """Every token prefers experts 0 and 1: half of the ranks of an expert group never get one."""
    with torch.no_grad():
        model.embedding.weight[:, 0] = 3.0
        for layer in model.moe_layers():
            layer.router.weight[:, 0] = torch.tensor([4.0, 3.0] + [-4.0] * (layer.kinds.total - 2))


def _uneven(model: DecoderLM) -> None:
    """Experts whose gradients differ by orders of magnitude: that of ``in_weight`` goes with ``out_weight``."""
    with torch.no_grad():
        for layer in model.moe_layers():
            for expert, weight in zip(layer.experts.expert_ids, layer.experts.out_weight, strict=True):
                weight.mul_(10.0 ** (expert - 2))


def _ties(model: DecoderLM) -> None:
    for layer in model.moe_layers():
        layer.router.weight.data.zero_()


def scale_of_gradients() -> Result:
    """C1, C6, C30: gradients and initial weights for every expert-parallel size."""
    out: Result = {}
    for size in (1, 2, 4):
        config = tiny(*_ep(size), *_no_clipping("engine.zero_stage=1"), rows=16, micro_batch_size=1)
        trained = _train(config)
        ours, theirs = trained["run"][0].gradients, trained["oracle"][0].gradients
        out[f"ratio {size}"] = {name: float(ours[name].norm() / theirs[name].norm()) for name in theirs}
        out[f"error {size}"] = {name: _relative(ours[name], theirs[name]) for name in theirs}
        fresh = Oracle(config, 1).weights
        out[f"initial {size}"] = {n: torch.equal(w, fresh[n]) for n, w in trained["initial"].items()}
        unchanged = {
            name: torch.equal(weight, trained["initial"][name]) for name, weight in trained["run"][0].weights.items()
        }
        out[f"unchanged {size}"] = unchanged
        experts = {
            name: int(checksum(parameter))
            for name, parameter in trained["engine"].model.named_parameters()
            if is_expert(parameter)
        }
        out[f"experts of ranks {size}"] = _everyone(experts)
        engine = trained["engine"]
        held = [id(p) for group in engine.optimizer.bit16_groups for p in group]
        out[f"optimizer holds the model {size}"] = sorted(held) == sorted(id(p) for p in engine.model.parameters())
    return out


def changed_replicas() -> Result:
    """C2: what the check between steps says of one changed number on one rank, and of two equal experts."""
    config = tiny(*_ep(2))
    mesh = build_mesh(config.parallel, "cpu")
    engine = build_engine(config, plan_run(config, mesh.world_size, ("cpu", "float32")), mesh)
    experts = engine.model.moe_layers()[1].experts.in_weight

    def complaint() -> str:
        try:
            check_replicas(engine.model, mesh, 7)
        except SanityError as error:
            return str(error)
        return ""

    out: Result = {"untouched": _everyone(complaint())}
    for name, tensor, rank in (("dense", engine.model.embedding.weight, 3), ("expert", experts, 2)):
        before = tensor.detach().clone()
        if mesh.rank == rank:
            tensor.data.view(-1)[-1] += 1e-6
        out[name] = _everyone(complaint())
        tensor.data.copy_(before)
    with torch.no_grad():
        experts[1] = experts[0]
    out["equal"] = _everyone(complaint())
    return out


def norms() -> Result:
    """C3: the norm with uneven experts, and with experts and a rank without tokens."""
    out: Result = {}
    for name, change in (("uneven", _uneven), ("starved", _starve)):
        for size, stage in ((2, 0), (2, 1), (4, 0), (4, 2)):
            config = tiny(*_ep(size), *_no_clipping(f"engine.zero_stage={stage}"))
            trained = _train(config, change_model=change)
            ours, theirs = trained["run"][0].gradient_norm, trained["oracle"][0].gradient_norm
            out[f"{name} ep{size} zero{stage}"] = abs(ours / theirs - 1)
    config = tiny(*_ep(4), *_no_clipping("engine.zero_stage=1", "engine.dtype=bfloat16"))
    trained = _train(config, change_model=_uneven)
    out["bfloat16"] = abs(trained["run"][0].gradient_norm / trained["oracle"][0].gradient_norm - 1)
    return out


def clipped_steps() -> Result:
    """C4: twenty steps in which clipping bites."""
    out: Result = {}
    for stage in (0, 1):
        overrides = _ep(2, f"engine.zero_stage={stage}", "engine.gradient_clipping=0.05", "engine.check_every_steps=0")
        config = tiny(*overrides, rows=4, micro_batch_size=1)
        mesh = build_mesh(config.parallel, "cpu")
        plan = plan_batches(config.batch, config.model.sequence_length, mesh.world_size, config.num_steps)
        engine = build_engine(config, plan_run(config, mesh.world_size, ("cpu", "float32")), mesh)
        batches = [step for seed in range(7) for step in random_batches(config, mesh.world_size, seed)][:20]
        clipped = [
            engine.step(i, own_micro_batches(step, plan, mesh.rank)).gradient_norm > 0.1
            for i, step in enumerate(batches)
        ]
        out[f"always clipped {stage}"] = all(clipped)
        sums = {name: int(checksum(parameter)) for name, parameter in engine.model.named_parameters()}
        out[f"checksums {stage}"] = _everyone(sums)
    return out


def router_gradients() -> Result:
    """C5: with no aux loss the router learns from the LM loss alone."""
    out: Result = {}
    for name, router in (
        ("top1", ("router.top_k=1", "router.weights=raw")),
        ("top2", ("router.top_k=2",)),
        ("sigmoid", ("router.top_k=2", "router.score=sigmoid", "router.weights=raw")),
    ):
        no_aux = ("router.load_balance_weight=0", "router.router_z_weight=0")
        trained = _train(tiny(*_ep(2), *_no_clipping(*router, *no_aux)))
        ours, theirs = trained["run"][0].gradients, trained["oracle"][0].gradients
        routers = [key for key in theirs if "router" in key]
        out[name] = {key: (float(ours[key].norm()), _relative(ours[key], theirs[key])) for key in routers}
    return out


def starved_ranks() -> Result:
    """C7: experts, and whole ranks, that never get a token."""
    out: Result = {}
    for size, stage, recompute in ((2, 0, "none"), (2, 2, "full"), (4, 1, "selective")):
        overrides = _ep(size, f"engine.zero_stage={stage}", f"model.recompute={recompute}")
        trained = _train(tiny(*overrides), num_steps=3, change_model=_starve)
        ours, theirs = trained["run"], trained["oracle"]
        key = f"ep{size} zero{stage}"
        out[f"{key} counts"] = [step.tokens_per_expert for step in ours]
        experts = [name for name in theirs[0].gradients if ".experts." in name]
        out[f"{key} idle gradients"] = {name: float(ours[-1].gradients[name][2:].abs().max()) for name in experts}
        out[f"{key} weights"] = {n: _relative(ours[-1].weights[n], w) for n, w in theirs[-1].weights.items()}
    return out


def accumulation() -> Result:
    """C9, C12, C20: the same global batch cut in two ways, ragged, one rank with padding only."""
    out: Result = {}

    def all_padding_on_last_rank(batches: list) -> list:
        rows = sum(len(batch.row_positions) for batch in batches)
        seen, changed = 0, []
        for batch in batches:
            for row in range(len(batch.row_positions)):
                if seen >= rows * 3 // 4:
                    batch.row_positions[row], batch.document_ids[row], batch.labels[row] = -1, -1, IGNORE_INDEX
                seen += 1
            changed.append(batch)
        return changed

    for stage in (0, 1, 2):
        for size in (1, 4):
            overrides = _ep(2, f"engine.zero_stage={stage}", "router.load_balance_weight=3")
            config = tiny(*overrides, rows=16, micro_batch_size=size)
            is_first = not out  # to the oracle all of these are the same
            trained = _train(config, change_batches=all_padding_on_last_rank, with_oracle=is_first)
            out[f"zero{stage} micro{size}"] = trained["run"][0]
            if is_first:
                out["oracle"] = trained["oracle"][0]
    return out


def _mirror(model: DecoderLM) -> None:
    """The first layer sends every token to experts 0 and 1, the second to experts 2 and 3."""
    with torch.no_grad():
        model.embedding.weight[:, 0] = 5.0
        for layer, experts in zip(model.moe_layers(), ([0, 1], [2, 3]), strict=True):
            layer.router.weight.zero_()
            layer.router.weight[experts, 0] = 40.0


def balance_levels() -> Result:
    """C13, C16: the same batches under each level; layers with opposite imbalances."""
    out: Result = {}
    out["mirrored"] = _train(tiny(*_ep(2)), change_model=_mirror, with_oracle=False)["run"][0].aux["load_balance"]
    for level in ("micro_batch", "sequence", "global_batch"):
        config = tiny(*_ep(2, f"router.load_balance_level={level}"), rows=16, micro_batch_size=2)
        trained = _train(config)
        out[level] = tuple(records[0].aux["load_balance"] for records in (trained["run"], trained["oracle"]))
    one_batch = tiny("router.load_balance_level=micro_batch", rows=16, micro_batch_size=16)
    out["one big batch"] = Oracle(one_batch, 1).step(0, random_batches(one_batch, 1)[0]).aux["load_balance"]
    return out


def recompute() -> Result:
    """C14, C24: inputs in which every score ties, with and without recomputation."""
    out: Result = {}
    for mode in ("none", "selective", "full"):
        config = tiny(*_ep(2, f"model.recompute={mode}"), *WITH_ALL_PARTS)
        mesh = build_mesh(config.parallel, "cpu")
        plan = plan_batches(config.batch, config.model.sequence_length, mesh.world_size, config.num_steps)
        batches = random_batches(config, mesh.world_size)[0]
        engine = build_engine(config, plan_run(config, mesh.world_size, ("cpu", "float32")), mesh, _ties)
        calls: list[int] = []
        for layer in engine.model.moe_layers():
            layer.router.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        step = record(engine, 0, own_micro_batches(batches, plan, mesh.rank))
        out[mode] = (step, len(calls))
    out["oracle"] = mesh.on_main(lambda: Oracle(config, plan.num_steps, change_model=_ties).step(0, batches))
    return out


def reported_loss() -> Result:
    """C19: the loss in the log beside the cross-entropy of the logits."""
    config = tiny(*_ep(2, "router.load_balance_weight=5", "router.router_z_weight=5"))
    mesh = build_mesh(config.parallel, "cpu")
    plan = plan_batches(config.batch, config.model.sequence_length, mesh.world_size, config.num_steps)
    batches = random_batches(config, mesh.world_size)[0]
    own = own_micro_batches(batches, plan, mesh.rank)
    engine = build_engine(config, plan_run(config, mesh.world_size, ("cpu", "float32")), mesh)
    totals = torch.zeros(2, dtype=torch.float64)
    for batch in own:
        arguments = (batch.input_ids, batch.document_ids, batch.position_ids, context_of(batch))
        logits = engine.model.logits(*arguments).double()
        labels = batch.labels.flatten()
        totals[0] += functional.cross_entropy(logits.flatten(0, 1), labels, ignore_index=IGNORE_INDEX, reduction="sum")
        totals[1] += (labels != IGNORE_INDEX).sum()
    dist.all_reduce(totals)
    modes: list[set[bool]] = []

    def note_mode(*seen: object) -> None:
        modes.append({module.training for module in engine.model.modules()})

    evaluation = engine.evaluate(own, note_mode)
    note_mode()
    result = engine.step(0, own)
    return {
        "modes": modes,
        "logged": result.loss,
        "evaluated": evaluation.loss,
        "from logits": float(totals[0] / totals[1]),
        "aux": result.aux_loss,
    }


def router_precision() -> Result:
    """C23: router weights that bfloat16 cannot tell apart, in a bfloat16 engine."""
    out: Result = {}

    def close(model: DecoderLM) -> None:
        with torch.no_grad():
            for layer in model.moe_layers():
                fine = layer.router.weight.clone()
                layer.router.weight.copy_(layer.router.weight[:1] + 1e-3 * fine)

    for stage in (1, 2):
        config = tiny(*_ep(2, f"engine.zero_stage={stage}", "engine.dtype=bfloat16"))
        mesh = build_mesh(config.parallel, "cpu")
        plan = plan_batches(config.batch, config.model.sequence_length, mesh.world_size, config.num_steps)
        batches = random_batches(config, mesh.world_size)
        engine = build_engine(config, plan_run(config, mesh.world_size, ("cpu", "bfloat16")), mesh, close)
        oracle = Oracle(config, plan.num_steps, change_model=close)
        router, exact = engine.model.moe_layers()[0].router, oracle.model.moe_layers()[0].router
        hidden = torch.randn(40, config.model.hidden_size, generator=torch.Generator().manual_seed(1)).bfloat16()
        context = context_of(own_micro_batches(batches[0], plan, mesh.rank)[0])
        context = type(context)(torch.ones(40, dtype=torch.bool), torch.arange(40), 1, 0, 0)
        chosen = (hidden.float() @ exact.weight.T).sort(dim=-1, descending=True, stable=True).indices[:, :2]
        routing = router(hidden, context)
        out[f"same experts {stage}"] = torch.equal(routing.expert_index, chosen.flatten())
        out[f"weight dtype {stage}"] = str(routing.weight.dtype)
        for i, step in enumerate(batches[:2]):
            engine.step(i, own_micro_batches(step, plan, mesh.rank))
        dtypes = {name: str(parameter.dtype) for name, parameter in engine.model.named_parameters()}
        out[f"dtypes {stage}"] = dtypes
        master = engine.master_weights()
        name = next(name for name in master if "router" in name)
        out[f"stored exactly {stage}"] = torch.equal(master[name], dict(engine.model.named_parameters())[name])
    return out


class _Multiples:
    """Expert ``e`` returns ``e + 1`` times its input, so a route that reaches a wrong expert shows."""

    def __init__(self, first_expert: int):
        self.first_expert = first_expert

    def __call__(
        self, sources: Tensor, weight: Tensor, order: ExpertRowLayout, payload: Tensor | None = None
    ) -> Tensor:
        factor = torch.arange(len(order.rows_per_expert)) + self.first_expert + 1
        rows = sources[order.source_of_row] * (weight * factor.repeat_interleave(order.rows_per_expert))[:, None]
        return torch.zeros_like(sources).index_add(0, order.source_of_row, rows)


def conservation() -> Result:
    """C27: experts that only scale, over the exchange; ragged ranks, tokens without routes."""
    out: Result = {}
    rank = dist.get_rank()
    tiny_mesh = build_mesh(tiny(*_ep(4)).parallel, "cpu")
    exchange = AllToAll(expert_groups(4)[0])
    assert tiny_mesh.shard.size == 4
    widths: set[int] = set()
    for name in ("ragged", "none on rank 0", "one expert"):
        random = torch.Generator().manual_seed(rank)
        tokens = 0 if name == "none on rank 0" and rank == 0 else 5 + 3 * rank
        routed = torch.rand(tokens, 8, generator=random) < 0.4
        if name == "one expert":
            routed = torch.zeros(tokens, 8, dtype=torch.bool)
            routed[:, 6] = True
        token, expert = routed.nonzero(as_tuple=True)
        hidden = torch.randn(tokens, 6, generator=random).requires_grad_()
        weight = torch.rand(len(token), generator=random).requires_grad_()
        zero = torch.zeros((), dtype=torch.float64)
        use = RouterUse(torch.zeros(8, dtype=torch.float64), zero, zero, zero)
        routing = Routing(token, expert, weight, None, use)
        with mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as send:
            output, _ = run_experts(hidden, routing, 8, _Multiples(2 * rank), exchange)
        messages = [call.args[1] for call in send.call_args_list if call.args[1].dtype == torch.uint8]
        widths |= {message.shape[1] for message in messages}
        factor = torch.randn(tokens, 6, generator=random)
        grads = torch.autograd.grad((output * factor).sum(), [hidden, weight])
        multiple = expert + 1
        per_token = torch.zeros(tokens).index_add(0, token, weight.detach() * multiple)
        grad_weight = (factor * hidden)[token].sum(1) * multiple
        expected = (per_token[:, None] * hidden, per_token[:, None] * factor, grad_weight)
        out[name] = _everyone(
            [float((a - b).abs().max()) if a.numel() else 0.0 for a, b in zip((output, *grads), expected, strict=True)]
        )
    config = tiny(*_ep(4, "model.moe.num_experts=8", "router.top_k=3"), rows=8, micro_batch_size=1)
    trained = _train(config, with_oracle=False)
    text = sum(int((batch.document_ids >= 0).sum()) for batch in trained["steps"][0])
    out["widths"] = widths
    out["routes"] = (trained["run"][0].tokens_per_expert.sum(dim=1).tolist(), 3.0 * text)
    return out


SCENARIOS = (
    *(
        scale_of_gradients,
        changed_replicas,
        norms,
        clipped_steps,
        router_gradients,
        starved_ranks,
        accumulation,
        balance_levels,
    ),
    *(recompute, reported_loss, router_precision, conservation),
)


def _run_scenarios(names: list[str]) -> dict[str, Result | str]:
    """Run scenarios; one that raises (on all ranks alike) leaves its traceback and does not stop the others."""
    results: dict[str, Result | str] = {}
    for scenario in SCENARIOS:
        if scenario.__name__ not in names:
            continue
        try:
            results[scenario.__name__] = scenario()
        except Exception:
            results[scenario.__name__] = traceback.format_exc()
    return results


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Callable[[str], Result]:
    # A test names its scenario as a literal: run those that the selected tests look at.
    literals = {word for item in request.session.items for word in item.function.__code__.co_consts}
    names = [scenario.__name__ for scenario in SCENARIOS if scenario.__name__ in literals]
    of_rank_0 = run_on_ranks(_run_scenarios, RANKS, names)[0]

    def of(scenario: str) -> Result:
        result = of_rank_0[scenario]
        assert not isinstance(result, str), result
        return result

    return of


# The tests.

Results = Callable[[str], Result]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_c01_expert_gradients_have_the_oracles_scale(results: Results, size: int) -> None:
    for name, ratio in results("scale_of_gradients")[f"ratio {size}"].items():
        assert ratio == pytest.approx(1.0, abs=1e-5), name


def test_c02_experts_are_replicated_over_the_expert_data_group_only(results: Results) -> None:
    ranks = results("scale_of_gradients")["experts of ranks 2"]
    assert ranks[0] == ranks[2] and ranks[1] == ranks[3]
    assert all(ranks[0][name] != ranks[1][name] for name in ranks[0])
    one = results("scale_of_gradients")["experts of ranks 1"]
    assert one[0] == one[1] == one[2] == one[3]
    four = results("scale_of_gradients")["experts of ranks 4"]
    assert all(len({rank[name] for rank in four}) == 4 for name in four[0])


def test_c02_the_check_names_a_changed_replica(results: Results) -> None:
    said = results("changed_replicas")
    assert said["untouched"] == [""] * RANKS
    assert all("step 7: parameter embedding.weight differs" in line for line in said["dense"])
    # Ranks 0 and 2 hold the same experts; the others see nothing wrong in theirs and must stop too.
    assert ["experts.in_weight differs" in line for line in said["expert"]] == [True, False, True, False]
    assert all(line for line in said["expert"])
    assert all("two experts of layer 1 have the same weights" in line for line in said["equal"])


def test_c03_norm_counts_every_expert_once(results: Results) -> None:
    errors = dict(results("norms"))
    assert errors.pop("bfloat16") < 0.05
    assert all(error < 1e-5 for error in errors.values()), errors


@pytest.mark.parametrize("stage", [0, 1])
def test_c04_clipping_keeps_dense_weights_bitwise_equal(results: Results, stage: int) -> None:
    result = results("clipped_steps")
    assert result[f"always clipped {stage}"]
    sums = result[f"checksums {stage}"]
    for name in sums[0]:
        if ".experts." in name:
            assert sums[0][name] == sums[2][name] and sums[1][name] == sums[3][name], name
        else:
            assert len({rank[name] for rank in sums}) == 1, name


@pytest.mark.parametrize("scheme", ["top1", "top2", "sigmoid"])
def test_c05_router_learns_from_the_lm_loss_alone(results: Results, scheme: str) -> None:
    for name, (norm, error) in results("router_gradients")[scheme].items():
        assert norm > 1e-6 and error < 1e-5, name


@pytest.mark.parametrize("size", [1, 2, 4])
def test_c06_gradients_upstream_of_the_experts_are_whole(results: Results, size: int) -> None:
    errors = results("scale_of_gradients")[f"error {size}"]
    upstream = [name for name in errors if "embedding" in name or "attention" in name or "norm" in name]
    assert len(upstream) == 10
    assert all(errors[name] < 1e-5 for name in upstream), errors


@pytest.mark.parametrize("case", ["ep2 zero0", "ep2 zero2", "ep4 zero1"])
def test_c07_idle_experts_and_ranks_step_like_the_oracle(results: Results, case: str) -> None:
    result = results("starved_ranks")
    for counts in result[f"{case} counts"]:
        assert (counts[:, 2:] == 0).all() and (counts[:, :2] > 0).all()
    assert set(result[f"{case} idle gradients"].values()) == {0.0}
    assert all(error < 1e-5 for error in result[f"{case} weights"].values()), result[f"{case} weights"]


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_c09_accumulation_changes_no_update(results: Results, stage: int) -> None:
    result = results("accumulation")
    whole, expected = result[f"zero{stage} micro4"], result["oracle"]
    for size in (1, 4):
        cut = result[f"zero{stage} micro{size}"]
        for name, weight in whole.weights.items():
            assert _relative(cut.weights[name], weight) < 1e-5, name
            assert _relative(cut.gradients[name], expected.gradients[name]) < 1e-5, name


@pytest.mark.parametrize("size", [1, 2, 4])
def test_c10_optimizer_holds_and_moves_every_parameter(results: Results, size: int) -> None:
    result = results("scale_of_gradients")
    assert result[f"optimizer holds the model {size}"]
    assert not any(result[f"unchanged {size}"].values()), result[f"unchanged {size}"]


def test_c12_balance_loss_does_not_depend_on_the_cut(results: Results) -> None:
    result = results("accumulation")
    expected = result["oracle"]
    routers = [name for name in expected.gradients if "router" in name]
    for size in (1, 4):
        run = result[f"zero1 micro{size}"]
        assert run.aux["load_balance"] == pytest.approx(expected.aux["load_balance"], rel=1e-6)
        for name in routers:
            assert _relative(run.gradients[name], expected.gradients[name]) < 1e-5


def test_c13_each_balance_level_is_what_its_name_says(results: Results) -> None:
    result = dict(results("balance_levels"))
    whole, _ = result.pop("one big batch"), result.pop("mirrored")
    for level, (ours, theirs) in result.items():
        assert ours == pytest.approx(theirs, rel=1e-6), level
    assert result["global_batch"][0] == pytest.approx(whole, rel=1e-6)
    values = [ours for ours, _ in result.values()]
    assert all(abs(a - b) > 1e-3 for i, a in enumerate(values) for b in values[:i])


def test_c16_opposite_imbalances_of_two_layers_do_not_cancel(results: Results) -> None:
    assert results("balance_levels")["mirrored"] == pytest.approx(2.0, rel=1e-5)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_c14_recomputation_counts_no_route_twice(results: Results, mode: str) -> None:
    (kept, _), (again, _) = results("recompute")["none"], results("recompute")[mode]
    assert torch.equal(kept.tokens_per_expert, again.tokens_per_expert)
    assert kept.loss == again.loss and kept.aux == again.aux


def test_c19_logged_loss_is_the_cross_entropy(results: Results) -> None:
    result = results("reported_loss")
    assert result["aux"] > 1  # would show
    assert result["logged"] == pytest.approx(result["from logits"], rel=1e-6)
    assert result["evaluated"] == pytest.approx(result["from logits"], rel=1e-6)


def test_c29_evaluation_is_in_its_own_mode_and_training_goes_on_in_its(results: Results) -> None:
    *evaluating, after = results("reported_loss")["modes"]
    assert evaluating and all(mode == {False} for mode in evaluating) and after == {True}


def test_c20_every_counted_token_weighs_the_same(results: Results) -> None:
    result = results("accumulation")
    for size in (1, 4):
        assert result[f"zero1 micro{size}"].loss == pytest.approx(result["oracle"].loss, rel=1e-6)
        error = _relative(
            result[f"zero1 micro{size}"].gradients["embedding.weight"], result["oracle"].gradients["embedding.weight"]
        )
        assert error < 1e-5


@pytest.mark.parametrize("stage", [1, 2])
def test_c23_router_stays_float32_in_a_bfloat16_engine(results: Results, stage: int) -> None:
    result = results("router_precision")
    for name, dtype in result[f"dtypes {stage}"].items():
        assert dtype == ("torch.float32" if "router" in name else "torch.bfloat16"), name
    assert result[f"weight dtype {stage}"] == "torch.float32"
    assert result[f"same experts {stage}"]
    assert result[f"stored exactly {stage}"]


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_c24_recomputation_routes_the_same_under_ties(results: Results, mode: str) -> None:
    result = results("recompute")
    step, calls = result[mode]
    # Two micro-batches in each of two layers, once ahead for the global balance and once in training.
    assert calls == 8
    assert torch.equal(step.tokens_per_expert, result["oracle"].tokens_per_expert)
    for name, gradient in result["oracle"].gradients.items():
        assert torch.equal(step.gradients[name], result["none"][0].gradients[name]), name
        assert math.isclose(float(step.gradients[name].norm()), float(gradient.norm()), rel_tol=1e-5), name


def test_c27_dispatch_keeps_every_route_once(results: Results) -> None:
    result = dict(results("conservation"))
    counted, expected = result.pop("routes")
    assert counted == [expected, expected]
    widths = result.pop("widths")
    assert widths and all(width % ROW_ALIGNMENT_BYTES == 0 for width in widths), "rows of 24 and of 28 bytes"
    for name, ranks in result.items():
        assert max(max(errors) for errors in ranks) < 1e-4, name


@pytest.mark.parametrize("size", [1, 2, 4])
def test_c30_initial_weights_do_not_depend_on_expert_parallel(results: Results, size: int) -> None:
    assert all(results("scale_of_gradients")[f"initial {size}"].values())
