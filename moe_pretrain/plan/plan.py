"""Plan of a run, before anything is started: parameters, FLOPs, memory, traffic, time; and what fits where."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moe_pretrain import data
from moe_pretrain.config.compose import choices
from moe_pretrain.config.load import load
from moe_pretrain.config.match_budget import describe_match
from moe_pretrain.config.preflight import RunPlan, plan_run
from moe_pretrain.config.schema import Config
from moe_pretrain.engine.deepspeed_config import Dtype
from moe_pretrain.engine.optimizers.base import check_optimizer, describe_rates, rate_scales_by_group
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.model.parameter_groups import meta_model, parameter_roles
from moe_pretrain.model.size import ModelSize
from moe_pretrain.moe.build import sharded, width_problems
from moe_pretrain.moe.kernels import priced_kernels
from moe_pretrain.plan.checkpoint_time import Storage, checkpoint_time
from moe_pretrain.plan.cost import COMPARED, FROZEN, MEASURED, extra_forward, flops_by_part, traffic
from moe_pretrain.plan.layouts import RECOMPUTE, layouts
from moe_pretrain.plan.local_parameters import local_parameters
from moe_pretrain.plan.memory import Memory, memory_per_rank
from moe_pretrain.plan.micro_batch import USABLE, WORST_LOAD, with_largest_micro_batch
from moe_pretrain.plan.step_time import Machine, step_time
from moe_pretrain.system.words import short_duration, short_number

GIB = 2**30
_SHOWN_LAYOUTS = 5


@dataclass(frozen=True)
class Assumptions:
    """Assumptions on what the configuration does not say; the defaults are an H100's.

    Attributes:
        mfu: Share of the peak that model FLOPs reach, in (0, 1]; None to estimate the time by part.
        peak: FLOP/s of one device, dense bfloat16.
        memory_bandwidth: GB/s of its memory that copies reach.
        link: GB/s that one device sends to others of its node.
        network: GB/s that one device sends to other nodes.
        gpus_per_node: Devices of a node.
        host_link: GB/s from one device to the memory of its host.
        disk: GB/s that a node writes.
        gpu_memory: GiB of one device.
        worst_load: Rows on the busiest rank over the mean, under expert parallelism, >= 1.
    """

    mfu: float | None = None
    peak: float = 989e12
    memory_bandwidth: float = 3000.0
    link: float = 300.0
    network: float = 50.0
    gpus_per_node: float = 8
    host_link: float = 25.0
    disk: float = 2.0
    gpu_memory: float = 79.0
    worst_load: float = WORST_LOAD

    def __post_init__(self) -> None:
        if self.mfu is not None and not 0 < self.mfu <= 1:
            raise ValueError(f"--mfu={self.mfu} must be in (0, 1]")
        if self.worst_load < 1:
            raise ValueError(f"--worst-load={self.worst_load} must be at least 1")
        if self.gpus_per_node < 1 or self.gpus_per_node % 1:
            raise ValueError(f"--gpus-per-node={self.gpus_per_node:g} must be a whole number, at least 1")
        for name in ("peak", "memory_bandwidth", "link", "network", "host_link", "disk", "gpu_memory"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name.replace('_', '-')}={getattr(self, name)} must be positive")

    @property
    def machine(self) -> Machine:
        """Rates of the devices."""
        return Machine(
            self.peak, 1e9 * self.memory_bandwidth, 1e9 * self.link, 1e9 * self.network, int(self.gpus_per_node)
        )

    @property
    def storage(self) -> Storage:
        """Rates at which state leaves the devices."""
        return Storage(1e9 * self.host_link, 1e9 * self.disk, int(self.gpus_per_node))

    @property
    def room(self) -> float:
        """Bytes of one device that are counted on."""
        return USABLE * self.gpu_memory * GIB


def target(config: Config) -> tuple[str, Dtype]:
    """Device and dtype planned for: a GPU in bfloat16 unless the configuration says otherwise, whatever is here."""
    device = "cpu" if config.engine.device == "cpu" else "cuda"
    if config.engine.dtype != "auto":
        return device, config.engine.dtype
    return device, "float32" if device == "cpu" else "bfloat16"


def planned(config: Config) -> RunPlan:
    """The plan of a run of ``config`` on the machines that it is for.

    Raises:
        ValueError: The global batch does not divide.
    """
    return plan_run(config, config.parallel.processes, target(config))


def problems(config: Config) -> list[str]:
    """Every way in which batch, experts and widths do not divide, each with the nearest values that work."""
    ranks = config.parallel.processes
    checks: list[Callable[[], object]] = [
        lambda: planned(config),
        lambda: config.parallel.check(ranks, *sharded(config.model.moe, config.router)),
    ]
    found = []
    for check in checks:
        try:
            check()
        except ValueError as error:
            found.append(str(error))
    if target(config) == ("cuda", "bfloat16"):
        found += width_problems(config.model.moe, config.router, config.model.hidden_size)
    return found


def epochs(config: Config, tokens: int) -> str:
    """Number of passes that ``tokens`` tokens make through the corpus, if that is in the cache."""
    known = None
    if not isinstance(config.data, data.MixtureConfig) and not config.streaming.applies_to(config.data):
        cache = Path(config.run.cache_dir)
        known = data.prepared_tokens(config.data, config.tokenizer, cache, config.num_tokens)
    if known is None:
        return "epochs: unknown until the corpus is prepared"
    return f"{tokens / known:.2f} epochs over {known:,} training tokens"


def describe(overrides: Sequence[str], assumed: Assumptions, say: Callable[[str], None]) -> int:
    """Print the plan of a configuration; starts nothing.

    Returns:
        Exit code: 0, or 1 when the configuration does not divide and only the model could be described.

    Raises:
        ValueError: The configuration is wrong.
    """
    asked = load(overrides)
    check_optimizer(asked.optimizer, asked.model, asked.router)
    config = _sized(asked, assumed)
    found = problems(config)
    size = config.size if found else planned(config).size
    model = meta_model(config.model, config.router)
    ranks, expert_parallel = config.parallel.processes, config.parallel.expert_parallel_size
    say(
        f"{config.model.name}, {' '.join(_chosen(config))}: {short_number(size.total_parameters)} parameters, "
        f"{short_number(size.active_parameters)} active; checkpoint "
        f"{_gib(_checkpoint_bytes(config, model))}, {config.checkpoint.keep_last} kept"
    )
    for line in describe_match(config.model, config.router, config.budget):
        say(line)
    if rates := describe_rates(rate_scales_by_group(model, config.optimizer)):
        say(rates)
    _say_flops(size, say)
    for problem in found:
        say(f"DOES NOT DIVIDE: {problem}")
    if found:
        if target(config)[0] == "cuda":
            _say_layouts(config, assumed, say)
        return 1
    run = planned(config)
    plan, device, dtype = run.batches, run.device, run.dtype
    extra = extra_forward(config, size, plan)
    if extra:
        say(f"  beside those, recomputed or run ahead: {short_number(extra)} FLOPs per token")
    tokens = plan.num_steps * plan.tokens_per_step
    say(
        f"{plan.num_steps:,} steps of {plan.tokens_per_step:,} tokens ({plan.accumulation} micro-batches of "
        f"{plan.micro_batch_size} rows on each of {ranks} ranks), {short_number(tokens)} tokens"
        f"{config.budget.describe()}; {epochs(config, tokens)}"
    )
    memory = memory_per_rank(config, device, dtype, plan, ranks, assumed.worst_load)
    stage, recompute = config.engine.stage(dtype, ranks), config.model.recompute
    say(
        f"memory per rank, {device} {dtype}, kernels {priced_kernels(config.engine.kernels, device)}, {ranks} ranks, "
        f"expert parallel {expert_parallel}, ZeRO {stage}, "
        f"recompute {recompute}, exchange at {assumed.worst_load:g} times the mean load:"
    )
    for name, value in vars(memory).items():
        say(f"  {name:<14}{_gib(value):>12}")
    say(f"  {'peak':<14}{_gib(memory.total):>12}  {_verdict(memory, assumed)}; carried becomes gradients and copies")
    say("bytes that a rank sends per step:")
    for name, value in traffic(config, dtype, plan).items():
        say(f"  {name:<34}{_gib(value):>12}")
    seconds = _say_time(config, run, assumed, say)
    if device == "cuda":
        _say_checkpoint(config, seconds, assumed, say)
    if asked.batch.micro_batch_size == "auto":
        say(f"batch.micro_batch_size=auto is {plan.micro_batch_size} on such a GPU")
    if device == "cuda":
        _say_layouts(config, assumed, say)
    say_sizes(overrides, assumed, say)
    return 0


def _sized(config: Config, assumed: Assumptions) -> Config:
    """``config`` with a number of rows in a micro-batch, where it asks for what fits."""
    if config.batch.micro_batch_size != "auto":
        return config
    return with_largest_micro_batch(config, config.parallel.processes, target(config), assumed.room, assumed.worst_load)


def _say_time(config: Config, run: RunPlan, assumed: Assumptions, say: Callable[[str], None]) -> float:
    """Of a step and of the run: by part, or at the share of the peak that is assumed; seconds of a step, if known."""
    plan, ranks = run.batches, config.parallel.processes
    least = plan.tokens_per_step * run.size.training_flops_per_token / (ranks * assumed.peak)
    if assumed.mfu is not None:
        seconds, mfu = least / assumed.mfu, assumed.mfu
    elif run.device == "cuda":
        parts = step_time(config, run, local_parameters(config), assumed.machine)
        say("seconds of a step, estimated from FLOPs and counted bytes (not measured on a GPU):")
        for name, value in vars(parts).items():
            say(f"  {name:<14}{value:>10.3f}  {value / parts.total:>6.1%}")
        seconds, mfu = parts.total, least / parts.total
    else:
        return 0.0
    say(
        f"time at {mfu:.1%} of {assumed.peak:.3g} FLOP/s on each of {ranks} ranks: "
        f"{short_duration(seconds * plan.num_steps)}, {seconds:.3g} s a step, "
        f"{plan.tokens_per_step / ranks / seconds:,.0f} tokens/s on each"
    )
    return seconds


def _say_checkpoint(config: Config, step_seconds: float, assumed: Assumptions, say: Callable[[str], None]) -> None:
    """Time of a checkpoint, and the share of the run that it takes."""
    settings = config.checkpoint
    found = checkpoint_time(config, config.parallel.processes, local_parameters(config), assumed.storage)
    interval = settings.every_steps * step_seconds
    waiting = found.waiting(interval, settings.asynchronous)
    say(
        f"checkpoint every {settings.every_steps:,} steps ({short_duration(interval)}): training waits {waiting:.2g} s "
        f"({waiting / (interval + waiting):.2%}) while {_gib(found.rank_bytes)} of a rank go to its host's memory at "
        f"{assumed.host_link:g} GB/s; written in {short_duration(found.written)} at {assumed.disk:g} GB/s of a node"
        + ("" if settings.asynchronous else ", for which training waits too")
        + ("; SLOWER THAN THE NEXT COMES" if settings.asynchronous and found.written > interval else "")
    )


def _say_layouts(config: Config, assumed: Assumptions, say: Callable[[str], None]) -> None:
    """The fastest layouts that fit, and which to take."""
    found = layouts(config, target(config), assumed.room, assumed.worst_load, assumed.machine)
    ranks = config.parallel.processes
    if not found:
        say(f"no layout of {ranks} ranks divides and fits in {USABLE:.0%} of {assumed.gpu_memory:g} GiB")
        return
    say(f"{len(found)} layouts of {ranks} ranks divide and fit; the fastest by the same estimate:")
    for layout in found[:_SHOWN_LAYOUTS]:
        say(f"  {layout.time.total:>8.3f} s a step {_gib(layout.memory.total):>12}  {layout.words}")
    say(f"take: {found[0].words}")


def _checkpoint_bytes(config: Config, model: DecoderLM) -> int:
    """float32 weights and moments."""
    roles = parameter_roles(model)
    return sum(
        (4 + config.optimizer.state(roles[name]).bytes_per_element) * parameter.numel()
        for name, parameter in model.named_parameters()
    )


def _chosen(config: Config) -> list[str]:
    """The scheme, and the parts of it that are not the usual ones."""
    moe = config.model.moe
    parts = {
        "experts": (moe.experts.name, "swiglu"),
        "combine": (moe.combine.name, "sum"),
        "optimizer": (config.optimizer.name, "adamw"),
    }
    others = [f"{group}={name}" for group, (name, usual) in parts.items() if name != usual]
    return [f"router={config.router.description}", *others]


def _say_flops(size: ModelSize, say: Callable[[str], None]) -> None:
    twice = "" if size.num_passes == 1 else f"; {size.num_passes} passes over every token, each"
    say(f"FLOPs per token: {short_number(size.training_flops_per_token)} (forward, and backward twice that{twice})")
    for name, value in flops_by_part(size).items():
        if value:
            share = value / size.forward_flops_per_token
            backward = {FROZEN: 0.0, MEASURED: 0.0, COMPARED: value}.get(name, 2 * value)
            say(f"  {name:<34}{short_number(value):>8} forward{short_number(backward):>8} backward{share:>7.1%}")
    if size.update_flops_per_token:
        share = size.update_flops_per_token / size.training_flops_per_token
        say(f"  {'updates of the optimizer':<34}{short_number(size.update_flops_per_token):>8}, {share:.2%} of all")


_OF_SIZE = (
    *("model", "model.name", "model.num_layers", "model.hidden_size", "model.num_heads", "model.ffn_hidden_size"),
    "model.moe.expert_hidden_size",
)
"""Fields by which sizes differ: with one run's, all rows would be about the same model."""


def say_sizes(overrides: Sequence[str], assumed: Assumptions, say: Callable[[str], None]) -> None:
    """Total memory of every size as it ships, with the other overrides, by recomputation."""
    say(f"sizes on {assumed.gpu_memory:g} GiB, of which {USABLE:.0%} are counted on; recompute:")
    say(f"  {'model':<8}" + "".join(f"{name:>22}" for name in RECOMPUTE))
    others = [word for word in overrides if word.lstrip("+").partition("=")[0] not in _OF_SIZE]
    for name in choices(overrides)["model"]:
        try:
            config = _sized(load([*others, f"model={name}"]), assumed)
            plan = planned(config).batches
        except ValueError as error:
            say(f"  {name:<8}  {error}")
            continue
        cells = []
        for recompute in RECOMPUTE:
            changed = replace(config, model=replace(config.model, recompute=recompute))
            memory = memory_per_rank(changed, *target(changed), plan, config.parallel.processes, assumed.worst_load)
            cells.append(f"{_gib(memory.total)} {'fits' if _fits(memory, assumed) else 'no':>4}")
        say(f"  {name:<8}" + "".join(f"{cell:>22}" for cell in cells))


def _fits(memory: Memory, assumed: Assumptions) -> bool:
    return memory.total <= assumed.room


def _verdict(memory: Memory, assumed: Assumptions) -> str:
    room = f"{USABLE:.0%} of {assumed.gpu_memory:g} GiB"
    return f"fits in {room}" if _fits(memory, assumed) else f"DOES NOT FIT in {room}"


def _gib(value: float) -> str:
    if value < 0.01 * GIB:
        return f"{value / 2**20:.2f} MiB"
    return f"{value / GIB:.2f} GiB"
