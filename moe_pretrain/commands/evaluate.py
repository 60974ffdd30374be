"""``evaluate``: the loss of a run on text of any kind, and its results in tasks of lm-evaluation-harness."""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from moe_pretrain.commands.options import Parser
from moe_pretrain.commands.trained_run import add_run, add_tokenizer, find_tokenizer, open_run
from moe_pretrain.config.schema import Config, ConfigError
from moe_pretrain.config.trained import TrainedRun
from moe_pretrain.data.tokenizer.tokenizer import Tokenizer
from moe_pretrain.inference.corpus_loss import check_likelihood, corpus_loss
from moe_pretrain.inference.harness.extra import check_tasks
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.parallel.launcher import run_workers
from moe_pretrain.parallel.rendezvous import launched_number, launched_rank, launched_world_size
from moe_pretrain.parallel.sharing import ALONE, Sharing
from moe_pretrain.run_folder.task_results import TaskResult, TaskResultFiles
from moe_pretrain.system.gpu import device_for_inference

_ROWS = 8
"""Full rows at once where the run has no micro-batches of its own."""


def arguments(parser: Parser) -> None:
    """A run, files of text, and tasks."""
    add_run(parser)
    parser.add_argument(
        "words",
        metavar="FILE",
        nargs="*",
        default=[],
        help="text, or .jsonl; tasks=NAME,FILE.yaml: tasks of lm-evaluation-harness, or task files; "
        "router_file=PATH: python of the run's own router",
    )
    parser.add_argument("--column", default="text", help="field of a .jsonl row that holds the text (default: text)")
    parser.add_argument("--max-documents", type=int, metavar="N", help="documents of each file or task that are read")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="tasks: examples before each question")
    parser.add_argument("--batch-size", type=int, metavar="ROWS", help="tasks: full rows at once (default: the run's)")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="processes that share the tasks")
    add_tokenizer(parser)
    parser.add_examples(
        "outputs/tiny-top_k books.txt code.jsonl --max-documents=100",
        "outputs/tiny-top_k tasks=my_tasks/facts.yaml",
        "outputs/tiny-top_k tasks=hellaswag,arc_easy --num-fewshot=5 --processes=2",
    )


def run(options: argparse.Namespace) -> int:
    """Print the loss on each file, then the results of each task."""
    options.router_files = [word for word in options.words if word.startswith("router_file=")]
    tasks = [name for word in options.words if word.startswith("tasks=") for name in word[6:].split(",")]
    files = [Path(word) for word in options.words if not word.startswith(("router_file=", "tasks="))]
    _check(options, files, tasks)
    trained = open_run(options)
    tokenizer, _ = find_tokenizer(trained, options.tokenizer)
    launched, is_main = launched_world_size(), launched_rank() == 0
    starts_workers = launched is None and options.processes > 1
    name = trained.config.router.name
    rule = check_likelihood(trained.meta_model(), name)
    if tasks:  # seconds of imports, and no model for a task that is not there
        from moe_pretrain.inference.harness.evaluate_tasks import check_router
        from moe_pretrain.inference.harness.tasks import load_tasks

        loaded = load_tasks("tasks", tasks, options.num_fewshot)
        check_router(trained.meta_model(), name, loaded)
        if starts_workers:  # they find the data in the cache
            return run_workers(_words(options), options.processes)
        keeps = [name for name, task in loaded["tasks"].items() if task.get_config("num_fewshot") == 0]
        if options.num_fewshot and keeps and is_main:
            _note(f"no examples for {', '.join(keeps[:5])}: num_fewshot: 0 stands in the task itself, and stays")
    if rule and is_main:
        _note(f"router={name} decides here by its evaluation rule: {rule}")
    model = trained.model(device_for_inference(launched_number("LOCAL_RANK") or 0))
    if files and is_main:
        _print_losses(model, trained.config, tokenizer, files, options)
    if not tasks:
        return 0
    from moe_pretrain.inference.harness.evaluate_tasks import evaluate_tasks
    from moe_pretrain.inference.harness.language_model import HarnessModel

    trained_with = trained.config.batch.micro_batch_size
    rows = options.batch_size or (trained_with if isinstance(trained_with, int) else _ROWS)
    sharing = _sharing(trained.config, launched)
    adapter = HarnessModel(model, tokenizer, rows * trained.config.model.sequence_length, sharing)
    results = evaluate_tasks(adapter, loaded, options.max_documents, rule)
    if is_main:
        _print_results(trained, results)
    return 0


def _check(options: argparse.Namespace, files: Sequence[Path], tasks: Sequence[str]) -> None:
    """Refuse mistakes before a model is loaded."""
    if not files and not tasks:
        raise ConfigError("FILE must name a text to evaluate on, or tasks=NAME a task")
    for option, least in (("max_documents", 1), ("num_fewshot", 0), ("batch_size", 1), ("processes", 1)):
        value = getattr(options, option)
        if value is not None and value < least:
            raise ConfigError(f"--{option.replace('_', '-')}={value} must be at least {least}")
    for option, given in (("num_fewshot", None), ("batch_size", None), ("processes", 1)):
        if not tasks and getattr(options, option) != given:
            raise ConfigError(f"--{option.replace('_', '-')} is of tasks: tasks=NAME must name one")
    for file in files:
        if not file.is_file():
            raise ConfigError(f"FILE={file} must be a file that exists")
        next(_texts(file, options.column), None)  # a wrong column is said before a model is loaded
    check_tasks("tasks", tasks)


def _note(line: str) -> None:
    print(f"moe-pretrain evaluate: {line}", file=sys.stderr)


def _words(options: argparse.Namespace) -> list[str]:
    """The command line of a worker."""
    values = {name: getattr(options, name) for name in ("column", "max_documents", "num_fewshot", "batch_size")}
    given = {**values, "tokenizer": options.tokenizer}
    named = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None]
    return ["evaluate", str(options.run), *options.words, *named]


def _sharing(config: Config, launched: int | None) -> Sharing:
    """This rank's part; each has the whole model."""
    if launched is None:
        return ALONE
    from moe_pretrain.parallel.mesh import build_mesh  # DeepSpeed, which one process does without

    mesh = build_mesh(replace(config.parallel, expert_parallel_size=1), "cuda" if torch.cuda.is_available() else "cpu")
    return Sharing(mesh.rank, mesh.world_size, device=mesh.device)


def _print_losses(
    model: DecoderLM, config: Config, tokenizer: Tokenizer, files: Sequence[Path], options: argparse.Namespace
) -> None:
    if not all(layer.router.causal_in_evaluation for layer in model.moe_layers()):
        raise ConfigError(
            f"router={config.router.name}: a token's experts depend on later tokens in evaluation too, so that "
            "its loss is not that of a language model"
        )
    print(f"{'documents':>9} {'tokens':>10} {'nats/token':>10} {'perplexity':>10} {'bits/byte':>9}  file")
    for file in files:
        texts = _texts(file, options.column)
        found = corpus_loss(model, tokenizer, itertools.islice(texts, options.max_documents))
        if not found.documents:
            raise ConfigError(f"FILE={file} holds no text")
        print(
            f"{found.documents:>9,} {found.tokens:>10,} {found.loss:>10.4f} {found.perplexity:>10.2f} "
            f"{found.bits_per_byte:>9.4f}  {file}",
            flush=True,
        )


def _print_results(trained: TrainedRun, results: Sequence[TaskResult]) -> None:
    """Write the results into the run's folder, and print them."""
    path = TaskResultFiles(trained.folder).add(trained.state.step, results)
    print(f"{'documents':>9} {'examples':>8} {'value':>12} {'error':>10}  task, metric")
    for result in results:
        for metric in result.metrics:
            value = "not finite" if metric.value is None else f"{metric.value:.4f}"
            error = "" if metric.error is None else f"{metric.error:.4f}"
            asked = f"{result.documents:>9,} {result.num_fewshot:>8}"
            print(f"{asked} {value:>12} {error:>10}  {result.name}, {metric.name}")
    print(f"step {trained.state.step}: {path}")


def _texts(file: Path, column: str) -> Iterator[str]:
    """The documents of a file: one for each row of a .jsonl, else the whole of it.

    Raises:
        ConfigError: It is not UTF-8, or a row has no such text.
    """
    try:
        if file.suffix != ".jsonl":
            yield file.read_text(encoding="utf-8")
            return
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    text = json.loads(line)[column]
                except (ValueError, KeyError, TypeError):
                    text = None
                if not isinstance(text, str):
                    raise ConfigError(f"FILE={file} has no text {column!r} in line {number}: --column names the field")
                yield text
    except UnicodeDecodeError as error:
        raise ConfigError(f"FILE={file} must be UTF-8: {error.reason} at byte {error.start}") from None
