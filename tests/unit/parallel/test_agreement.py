"""Ranks that have found different things are refused, in one line that says which ranks on which hosts."""

import socket
import threading
from pathlib import Path

import pytest
import torch.distributed as dist
from helpers.processes import run_on_ranks

from moe_pretrain.config.load import load
from moe_pretrain.config.preflight import preflight
from moe_pretrain.parallel import agreement
from moe_pretrain.parallel.agreement import require_same
from moe_pretrain.parallel.rendezvous import Rendezvous
from moe_pretrain.train import build


def verdicts(
    monkeypatch: pytest.MonkeyPatch, hosts: list[str], kernels: list[str], devices: list[str] | None = None
) -> list[str]:
    """What each rank is told, one thread each; empty where it goes on."""
    store, told = dist.HashStore(), [""] * len(hosts)
    here = threading.local()
    monkeypatch.setattr(agreement.socket, "gethostname", lambda: here.name)

    def meet(rank: int) -> None:
        here.name = hosts[rank]
        found = {"engine.device": devices[rank] if devices else "cuda", "engine.kernels": kernels[rank]}
        try:
            require_same(Rendezvous(store, rank, len(hosts)), found)
        except ValueError as error:
            told[rank] = str(error)

    threads = [threading.Thread(target=meet, args=(rank,), daemon=True) for rank in range(len(hosts))]
    for thread in reversed(threads):
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return told


def test_ranks_that_found_the_same_go_on(monkeypatch: pytest.MonkeyPatch):
    assert verdicts(monkeypatch, ["a", "a", "b"], ["liger"] * 3) == [""] * 3


def test_every_rank_is_told_who_has_what(monkeypatch: pytest.MonkeyPatch):
    """Of six ranks on three hosts, two of which have the package."""
    told = verdicts(monkeypatch, ["a", "a", "b", "b", "c", "a"], ["liger", "liger", "torch", "torch", "liger", "liger"])
    assert (
        told
        == [
            "engine.kernels must be the same on every rank, and is liger on ranks 0-1, 5 (a), rank 4 (c) and torch on "
            "ranks 2-3 (b): give their hosts the same environment, or set engine.kernels"
        ]
        * 6
    )


def test_every_field_that_differs_is_said(monkeypatch: pytest.MonkeyPatch):
    told = verdicts(monkeypatch, ["a", "b"], ["liger", "torch"], ["cuda", "cpu"])
    assert len(set(told)) == 1
    first, second = told[0].split("; ")
    assert first.startswith("engine.device must be the same on every rank, and is cuda on rank 0 (a) and cpu on rank 1")
    assert second.startswith("engine.kernels must be")


def refusal_of_a_run(folder: str) -> str:
    """What ``train`` says where the second rank finds liger's kernels."""
    words = ["model=tiny", "tokenizer=pretrained", "tokenizer.path=unused", "metrics.wandb=off", "engine.device=cpu"]
    config = load([*words, "parallel.processes=2", f"run.output_dir={folder}", "run.name=mixed"])
    plan = preflight(config, 2)
    if dist.get_rank() == 1:
        build.resolve_kernels = lambda asked, device: "liger"
    try:
        build.train(config, plan)
    except ValueError as error:
        return str(error)
    return ""


def test_a_run_of_mixed_kernels_is_refused_before_anything_is_built(tmp_path: Path):
    told = run_on_ranks(refusal_of_a_run, 2, str(tmp_path))
    host = socket.gethostname()
    assert told[0] == told[1]
    assert f"engine.kernels must be the same on every rank, and is torch on rank 0 ({host}) and liger on" in told[0]
