"""The route of a run, read from top to bottom: build each part in order, then the loop.

The only file that knows all others. ``train`` runs in every worker process; the command starts the workers.
"""

import contextlib
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from moe_pretrain.config.match_budget import describe_match
from moe_pretrain.config.preflight import RunPlan
from moe_pretrain.config.schema import Config, to_values
from moe_pretrain.data import ShardReader, TrainingCorpus, TrainLoader
from moe_pretrain.engine.engine import TrainEngine
from moe_pretrain.engine.optimizers.base import describe_rates, rate_scales_by_group
from moe_pretrain.metrics.wandb_start import keep_wandb_inside
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.model.init import initialise
from moe_pretrain.moe.kernels import resolve_kernels
from moe_pretrain.parallel.agreement import require_same, require_same_text
from moe_pretrain.parallel.deepspeed_moe import prepare_experts
from moe_pretrain.parallel.heartbeat import Heartbeat
from moe_pretrain.parallel.mesh import Mesh, build_mesh
from moe_pretrain.parallel.rendezvous import Rendezvous, meet
from moe_pretrain.run_folder.lock import RunInUse, joined, owned
from moe_pretrain.run_folder.provenance import claim_overrides, program_hash, router_file_hash, versions
from moe_pretrain.run_folder.record import flatten
from moe_pretrain.schedule.batch_plan import BatchPlan
from moe_pretrain.system.child_process import is_worker
from moe_pretrain.system.cpu import keep_freed_memory
from moe_pretrain.system.exit_codes import STOPPED
from moe_pretrain.system.gpu import lacks_grouped_products
from moe_pretrain.system.stop_signals import StopRequest
from moe_pretrain.train.context import RunContext, build_context
from moe_pretrain.train.corpora import Corpora, describe_corpus, open_run_data, prepare_corpora
from moe_pretrain.train.task_evaluator import RunTasks
from moe_pretrain.train.trainer import Trainer

_CLAIM = "moe_pretrain/claim"
TOKENS_COUNTED = 4_000_000
"""Tokens at the start of the run from which routers learn how often each id occurs."""


def train(config: Config, plan: RunPlan, overrides: Sequence[str] = ()) -> int:
    """Train ``config`` to its last step, going on from its newest checkpoint if there is one.

    Args:
        config: Resolved configuration.
        plan: Plan of ``preflight`` for this configuration and number of ranks.
        overrides: Words of the command line, for the run's folder.

    Returns:
        Exit code: 0 when the run is finished, ``signals.STOPPED`` when a signal ended it after a checkpoint,
        ``exit_codes.UNSAVED`` when its last checkpoint could not be written, ``exit_codes.NOT_FINITE`` when it has come
        to its end without a result.

    Raises:
        RunInUse: The run's folder belongs to another run.
    """
    if plan.device == "cpu":
        keep_freed_memory()
    folder, parallel = config.run.folder, config.parallel
    # wandb's own logs stay in the run folder, like everything of a run.
    keep_wandb_inside(folder)
    with StopRequest() as stop:  # first: from here on a signal never leaves one rank alone
        meeting = meet(parallel)
        # A stream may be waited for while the network fails.
        waits = config.streaming.retry_seconds if config.streaming.applies_to(config.data) else 0.0
        watched = Heartbeat(meeting, folder, parallel.heartbeat_seconds, parallel.timeout_seconds + waits)
        # Before the process group: its making can hang too.
        with _claimed(folder, overrides, meeting), watched as heartbeat:
            require_same(meeting, _found_here(config, plan))
            context = build_context(config.fault, build_mesh(parallel, plan.device, meeting), stop, heartbeat)
            try:
                return build_trainer(config, plan, context).train(overrides)
            except StoppedEarly:
                context.say(f"stopped by {stop.name} while the corpus was prepared; the same command goes on")
                return STOPPED


_OF_A_HOST = ("run.output_dir", "run.cache_dir", "run.prepare_workers")
"""Fields that each host may have in its own way."""


def _found_here(config: Config, plan: RunPlan) -> dict[str, str]:
    """All that decides what this rank does: settings, ``auto`` by its machine and packages, program, own router."""
    values = {name: str(value) for name, value in flatten(to_values(config)).items() if name not in _OF_A_HOST}
    return {
        **values,
        **{f"version of {package}": version for package, version in versions().items()},
        "files of moe_pretrain": program_hash(),
        "content of router_file": str(router_file_hash(config.router_file)),
        "engine.device": plan.device,
        "engine.dtype": plan.dtype,
        "engine.kernels": resolve_kernels(config.engine.kernels, plan.device),
        "batch.micro_batch_size": str(plan.batches.micro_batch_size),
    }


@contextlib.contextmanager
def _claimed(folder: Path, overrides: Sequence[str], meeting: Rendezvous) -> Iterator[None]:
    """Hold the run's folder: the first rank for all, then each rank until it ends.

    Raises:
        RunInUse: Another run holds it; on every rank.
    """
    with contextlib.ExitStack() as held:
        if meeting.rank == 0:
            refusal = ""
            try:
                if not is_worker():  # else our launcher owns it
                    held.enter_context(owned(folder, print))
                    claim_overrides(folder, overrides)
            except Exception as error:
                refusal = str(error) or repr(error)
                raise
            finally:
                meeting.store.set(f"{_CLAIM}/{meeting.attempt}", refusal)
        elif refusal := _read_claim(meeting):
            raise RunInUse(refusal)
        held.enter_context(joined(folder))
        yield


def _read_claim(meeting: Rendezvous) -> str:
    """The first rank's word: empty, or why it is refused the folder.

    Raises:
        ValueError: It does not come, as when that rank is stopped.
    """
    try:
        return meeting.store.get(f"{_CLAIM}/{meeting.attempt}").decode()
    except dist.DistStoreError:
        raise ValueError(
            "rank 0 has met the others, and then not come to its start-up within parallel.timeout_seconds"
        ) from None


def build_trainer(config: Config, plan: RunPlan, context: RunContext) -> Trainer:
    """Build each part of a run in order: data, model, engine, trainer.

    Raises:
        StoppedEarly: A signal came before there was anything to save.
    """
    mesh, say = context.mesh, context.say
    tasks = RunTasks(config)
    say(_describe_run(config, plan, mesh))
    for line in describe_match(config.model, config.router, config.budget):
        say(line)
    has_experts = config.model.moe_layers and not config.router.dense_experts
    if has_experts and (plan.device, plan.dtype) == ("cuda", "bfloat16") and (slow := lacks_grouped_products()):
        say(slow)

    if odd := config.schedule.check(plan.batches.num_steps):
        say(odd)
    data = open_run_data(config, plan, _prepare_corpora(config, context), mesh)
    meter = data.meter
    plan = plan.with_steps(meter.num_steps)  # the data may end before the budget
    for line in describe_corpus(data, plan, config):
        say(line)

    model = DecoderLM(config.model, config.router, mesh.shard)
    initialise(model, config.seed)
    if rates := describe_rates(rate_scales_by_group(model, config.optimizer)):
        say(rates)
    _tell_token_counts(model, data.loader, plan.batches, mesh)
    if competition := _describe_competition(config.router.name, model):
        say(competition)
    parallel = config.parallel
    prepare_experts(model, parallel.expert_parallel_size, parallel.overlaps_exchange(mesh.device.type))
    engine = TrainEngine(
        model,
        config.engine,
        plan.dtype,
        config.optimizer,
        lambda step: config.schedule.factor(step, meter.num_steps),
        plan.batches,
        mesh,
        config.seed,
        context.faults,
        context.enter,
    )
    return Trainer(config, plan, data, engine, context, tasks)


class StoppedEarly(Exception):
    """A signal came before there was anything to save; raised on all ranks together."""


def _prepare_corpora(config: Config, context: RunContext) -> Corpora:
    """Tokenise on the first rank, then open the result on all, which must have the same.

    The others wait in a collective that the first rank joins with every line of progress, so hours of tokenising do not
    look like a rank that hangs, and a signal to any of them ends it.

    Raises:
        StoppedEarly: A signal came.
        ValueError: A corpus cannot be used, or is not the same on every rank; one line.
    """
    mesh, say = context.mesh, context.say

    def share(number: int) -> int:
        """The run's number once the first rank has drawn it; 0 while that one is at work."""
        shared = torch.tensor(number, device=mesh.device)
        dist.all_reduce(shared)
        if context.agree_to_stop():
            raise StoppedEarly
        return int(shared)

    if not mesh.is_main:
        while not (number := share(0)):
            pass
        try:
            corpora = prepare_corpora(config, say, False, number)
        except (OSError, ValueError) as error:
            require_same_text({}, error)
            raise
        require_same_text(_texts_here(*corpora))
        return corpora
    is_at_work = True

    def report(line: str) -> None:
        say(line)
        if is_at_work:
            share(0)

    drawn = 1 + secrets.randbelow(2**31)
    corpora = prepare_corpora(config, report, True, drawn)
    is_at_work = False
    share(drawn)
    require_same_text(_texts_here(*corpora))
    return corpora


def _texts_here(corpus: TrainingCorpus, sets: Mapping[str, ShardReader]) -> dict[str, str]:
    """Hashes of the tokens that this rank has: each host may have its own copy of the text."""
    return {
        "text of data": corpus.fingerprint,
        **{f"text of evaluation set {name}": reader.fingerprint for name, reader in sets.items()},
    }


def _tell_token_counts(model: DecoderLM, loader: TrainLoader, plan: BatchPlan, mesh: Mesh) -> None:
    """Tell routers that ask how often each token id occurs in the first rows of the run, the same on any topology."""
    routers = [layer.router for layer in model.moe_layers() if layer.router.needs_token_counts]
    if not routers:
        return
    counts = torch.zeros(model.config.vocab_size, dtype=torch.int64)
    # Of a stream only the first step is sure to be there.
    steps = 1 if loader.num_rows is None else min(plan.num_steps, -(-TOKENS_COUNTED // plan.tokens_per_step))
    for step in range(steps):
        loader.reach(step)
        for batch in loader.micro_batches(step):
            counts += torch.bincount(batch.input_ids[batch.document_ids >= 0], minlength=len(counts))
    counts = counts.to(mesh.device)
    dist.all_reduce(counts)
    for router in routers:
        router.use_token_counts(counts)


def _describe_run(config: Config, plan: RunPlan, mesh: Mesh) -> str:
    batches, size = plan.batches, plan.size
    ranks = f"{mesh.world_size} rank{'s' if mesh.world_size > 1 else ''}"
    return (
        f"{config.run.name}: {size.total_parameters / 1e6:,.1f}M parameters, "
        f"{size.active_parameters / 1e6:,.1f}M active; "
        f"{batches.num_steps} steps of {batches.tokens_per_step:,} tokens ({batches.accumulation} micro-batches of "
        f"{batches.micro_batch_size} rows on each of {ranks}, {plan.device}, {plan.dtype}, kernels "
        f"{resolve_kernels(config.engine.kernels, plan.device)}, expert parallel "
        f"{mesh.shard.size}, ZeRO {config.engine.stage(plan.dtype, mesh.world_size)}){config.budget.describe()}"
    )


def _describe_competition(name: str, model: DecoderLM) -> str | None:
    """A loud line for a scheme whose routes in training depend on later tokens; None for the others."""
    routers = [layer.router for layer in model.moe_layers()]
    if all(router.causal_in_training for router in routers):
        return None
    evaluation = (
        "evaluation is causal: judge by the validation loss"
        if all(router.causal_in_evaluation for router in routers)
        else "so is evaluation: neither loss is that of a language model that generates"
    )
    return (
        f"NOT CAUSAL IN TRAINING: with router={name} the tokens of a micro-batch compete, so a token's experts depend "
        f"on later tokens, on other sequences and on the micro-batch's size; {evaluation}"
    )
