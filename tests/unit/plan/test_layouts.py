"""Time by part, and the layouts that ``plan`` ranks: they follow from FLOPs, bytes and what fits."""

import re
from dataclasses import replace

import pytest

from moe_pretrain.cli import USAGE_CODE, main
from moe_pretrain.config.load import load
from moe_pretrain.plan.cost import GRADIENTS, ROUTES, traffic
from moe_pretrain.plan.layouts import layouts
from moe_pretrain.plan.local_parameters import local_parameters
from moe_pretrain.plan.plan import Assumptions, planned, target
from moe_pretrain.plan.step_time import Machine, StepTime, step_time

H100 = Machine()


def time_of(*words: str, machine: Machine = H100) -> StepTime:
    config = load(["model=700m", "parallel.processes=8", *words])
    return step_time(config, planned(config), local_parameters(config), machine)


def test_each_part_follows_what_it_is_made_of() -> None:
    base, parallel = time_of(), time_of("parallel.expert_parallel_size=8")
    assert base.exchange == 0 and parallel.total > base.total
    sent = traffic(config := load(["model=700m", "parallel.processes=8", "parallel.expert_parallel_size=8"]),
                   "bfloat16", planned(config).batches)[ROUTES]  # fmt: skip
    slow = replace(H100, link=H100.link / 2)
    slower = time_of("parallel.expert_parallel_size=8", machine=slow).exchange
    assert slower - parallel.exchange == pytest.approx(sent / 2 / H100.link), "experts hide the other half"
    nodes = time_of("parallel.processes=16", "parallel.expert_parallel_size=8")
    assert nodes.exchange == pytest.approx(parallel.exchange / 2) and nodes.reduction > 5 * parallel.reduction
    full = time_of("model.recompute=full")
    assert (full.products, full.attention) > (base.products, base.attention) and full.memory > base.memory
    larger = time_of("batch.micro_batch_size=32")
    assert larger.accumulation == pytest.approx(base.accumulation / 4) and larger.products == base.products
    assert time_of("router=dense").routing == 0
    assert time_of("router.load_balance_level=global_batch").products > base.products
    assert base.total == pytest.approx(sum(vars(base).values()))


def test_halves_hide_as_much_of_the_exchange_as_experts_take() -> None:
    """Half of it where experts take longer; over a slow network all but their time, twice that in backward."""
    halves = ("parallel.expert_parallel_size=8", "batch.micro_batch_size=32")
    whole = (*halves, "parallel.overlap_exchange=never")
    config = load(["model=700m", "parallel.processes=8", *halves])
    run = planned(config)
    sent = traffic(config, "bfloat16", run.batches)[ROUTES] / H100.link
    gain = time_of(*whole).exchange - time_of(*halves).exchange
    assert 0.7 * sent / 2 < gain < sent / 2, "what is left goes to putting halves together"
    slow = replace(H100, link=H100.link / 100)
    routes = 2 * config.batch.global_batch_tokens / 8
    experts = routes * 12 * 2 * 3 * 768 * 3072 / (0.62 * H100.peak)
    hidden = time_of(*whole, machine=slow).exchange - time_of(*halves, machine=slow).exchange
    lost = sent / 2 - gain
    assert hidden + lost == pytest.approx(3 * experts)
    assert time_of(*halves[1:], machine=slow).exchange == 0


def test_gradients_are_reduced_with_every_micro_batch_at_stage_2() -> None:
    one, two = (load(["model=700m", "parallel.processes=8", f"engine.zero_stage={stage}"]) for stage in (1, 2))
    batches = planned(one).batches
    sent = [traffic(config, "bfloat16", batches)[GRADIENTS] for config in (one, two)]
    assert sent[1] == batches.accumulation * sent[0] > 0


def test_the_layout_to_take_is_the_fastest_that_fits_and_its_words_give_its_time(capsys) -> None:
    words = ["model=700m", "parallel.processes=8"]
    assert main(["plan", *words]) == 0
    out = capsys.readouterr().out
    taken = re.search(r"^take: (.*)$", out, re.M)[1].split()
    rows = re.findall(r"^ +([\d.]+) s a step +([\d.]+) GiB  (parallel.*)$", out, re.M)
    assert [float(row[0]) for row in rows] == sorted(float(row[0]) for row in rows) and rows[0][2].split() == taken
    assert main(["plan", *words, *taken]) == 0
    again = capsys.readouterr().out
    assert float(re.search(r"([\d.]+) s a step, ", again)[1]) == pytest.approx(float(rows[0][0]), rel=0.01)
    assert re.search(r"  peak +([\d.]+) GiB", again)[1] == rows[0][1]
    assumed = Assumptions()
    config = load(words)
    found = layouts(config, target(config), assumed.room, assumed.worst_load, H100)
    assert all(layout.memory.total <= assumed.room for layout in found)
    ways = {(own.config.parallel.expert_parallel_size, own.config.parallel.overlap_exchange) for own in found}
    assert ways == {(1, "auto"), *((size, way) for size in (2, 4, 8) for way in ("auto", "never"))}
    little = layouts(config, target(config), 0.15 * assumed.room, assumed.worst_load, H100)
    assert 0 < len(little) < len(found) and little[0].time.total > found[0].time.total
    assert main(["plan", *words, "--gpu-memory=1"]) == 0
    assert "no layout of 8 ranks divides and fits in 92% of 1 GiB" in capsys.readouterr().out


@pytest.mark.parametrize(("link", "way"), [(300e9, "auto"), (100e12, "never")])
def test_the_exchange_is_cut_in_halves_where_that_is_faster(link: float, way: str) -> None:
    """Over a link that takes no time, putting halves together is all that they do; the words say which way it is."""
    config = load(["model=700m", "parallel.processes=8"])
    found = layouts(config, target(config), 80e9, 1.0, replace(H100, link=link))
    spread = [layout for layout in found if layout.config.parallel.expert_parallel_size == 8]
    assert f" parallel.overlap_exchange={way} " in spread[0].words
    merging = load(["model=700m", "router=lory", "parallel.processes=2"])
    every = layouts(merging, target(merging), 80e9, 1.0, H100)
    assert {layout.config.parallel.overlap_exchange for layout in every} == {"auto"}


def test_where_the_micro_batch_does_not_divide_a_layout_that_does_is_named(capsys) -> None:
    assert main(["plan", "model=700m", "parallel.processes=512"]) == 1
    out = capsys.readouterr().out
    assert "DOES NOT DIVIDE: batch.global_batch_tokens=4194304 must be a multiple of 8388608" in out
    taken = re.search(r"^take: (.*)$", out, re.M)[1].split()
    assert main(["plan", "model=700m", "parallel.processes=512", *taken]) == 0


@pytest.mark.parametrize(
    ("flag", "constraint"),
    [
        ("--link=0", "positive"),
        ("--network=-1", "positive"),
        ("--memory-bandwidth=0", "positive"),
        ("--gpus-per-node=0", "a whole number, at least 1"),
        ("--gpus-per-node=0.5", "a whole number, at least 1"),
    ],
)
def test_wrong_rates_are_one_line(flag: str, constraint: str, capsys) -> None:
    assert main(["plan", "model=700m", flag]) == USAGE_CODE
    told = capsys.readouterr().err.strip()
    assert flag in told and told.endswith(f" must be {constraint}") and "\n" not in told
