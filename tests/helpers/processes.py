"""Run a function on several gloo ranks of this machine."""

import faulthandler
import importlib.util
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

_TESTS = Path(__file__).parent.parent
_GRACE_SECONDS = 3.0  # for the other ranks to report their own error after the first one


class RanksFailed(AssertionError):
    """One or more ranks raised, died or hung; the message holds every rank's traceback."""


def run_on_ranks(function: Callable[..., Any], ranks: int, *args: Any, timeout: float = 240.0) -> list[Any]:
    """Call ``function(*args)`` in ``ranks`` processes that form one gloo group.

    Processes are forked from a server that has done the slow imports, so a start costs well under a second. Arguments
    and results are pickled; classes defined in a test file cannot travel.

    Args:
        function: A module-level function.
        ranks: Number of processes.
        *args: Passed to every rank.
        timeout: Seconds until the processes are killed and their stacks reported.

    Returns:
        Results in rank order.
    """
    context = _server()
    with tempfile.TemporaryDirectory() as folder:
        place = (Path(folder), ranks, timeout)
        target = (function.__code__.co_filename, function.__qualname__)
        processes = [
            context.Process(target=_rank, args=(*place, rank, target, args), daemon=True) for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        _wait(processes, Path(folder), timeout)
        problems = [_problem(rank, process, Path(folder)) for rank, process in enumerate(processes)]
        if any(problems):
            raise RanksFailed("\n".join(problem for problem in problems if problem))
        return [pickle.loads((Path(folder) / f"{rank}.result").read_bytes()) for rank in range(ranks)]


def _server() -> Any:
    """The context whose server starts on first use, with the test folder on its path."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers.rank_preload"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(_TESTS), str(_TESTS.parent), *([before] if before else [])])
    try:
        multiprocessing.forkserver.ensure_running()  # type: ignore[attr-defined]
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
    return context


def _wait(processes: list[Any], folder: Path, timeout: float) -> None:
    """Until all have ended, or some time after the first error, or the timeout; then kill what is left."""
    deadline = time.monotonic() + timeout + 2
    failing = False
    while time.monotonic() < deadline and any(process.is_alive() for process in processes):
        failed = any(not process.is_alive() and process.exitcode for process in processes)
        if failed and not failing:
            failing, deadline = True, time.monotonic() + _GRACE_SECONDS
        time.sleep(0.02)
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()


def _problem(rank: int, process: Any, folder: Path) -> str:
    if process.exitcode == 0:
        return ""
    parts = [folder / f"{rank}.{kind}" for kind in ("output", "stack", "error")]
    text = "".join(part.read_text()[-8000:] for part in parts if part.exists())
    return f"--- rank {rank} (exit code {process.exitcode}; -9: killed when others failed) ---\n{text}"


def _rank(folder: Path, ranks: int, timeout: float, rank: int, target: tuple[str, str], args: tuple[Any, ...]) -> None:
    """Body of one process."""
    import jaxtyping
    import torch
    import torch.distributed as dist

    from helpers.typechecker import CHECK_EVERY_CALL

    # A test's ranks run the same code, so in the fast set one checks annotations.
    jaxtyping.config.update("jaxtyping_disable", rank != 0 and not CHECK_EVERY_CALL)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    output = os.open(folder / f"{rank}.output", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    stack = (folder / f"{rank}.stack").open("w")
    faulthandler.dump_traceback_later(timeout, exit=True, file=stack)
    try:
        store = dist.FileStore(str(folder / "store"), ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout))
        result = _find(*target)(*args)
        (folder / f"{rank}.result").write_bytes(pickle.dumps(result))
        dist.barrier()  # a rank that leaves early breaks the others' connections
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        _leave(1)
    _leave(0)


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # destructors of process groups may wait for ranks that are gone


def _find(file: str, name: str) -> Callable[..., Any]:
    """The function, from its file: pytest's module names cannot be imported."""
    module_name = f"_on_ranks_{Path(file).stem}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part)
    return found
