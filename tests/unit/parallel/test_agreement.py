"""Ranks that have found different things are refused, in one line that says which ranks on which hosts."""

import os
import socket
import threading
from pathlib import Path
from typing import NoReturn

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
            "ranks 2-3 (b): give their hosts the same command, files and environment, or set engine.kernels"
        ]
        * 6
    )


def test_every_field_that_differs_is_said(monkeypatch: pytest.MonkeyPatch):
    told = verdicts(monkeypatch, ["a", "b"], ["liger", "torch"], ["cuda", "cpu"])
    assert len(set(told)) == 1
    first, second = told[0].split("; ")
    assert first.startswith("engine.device must be the same on every rank, and is cuda on rank 0 (a) and cpu on rank 1")
    assert second.startswith("engine.kernels must be")


def test_fields_that_only_some_have_and_many_at_once_are_one_line():
    answers = [("a", {"seed": "1", "router.bias": "False"}), ("b", {"seed": "2"})]
    first, second = agreement._describe_differences(answers).split("; ")
    assert first.startswith("seed must be the same on every rank, and is 1 on rank 0 (a) and 2 on rank 1 (b): ")
    assert second.startswith("router.bias must be") and "and is False on rank 0 (a) and not there on rank 1" in second
    many = [(host, {f"version of package {number}": host for number in range(9)}) for host in ("a", "b")]
    said = agreement._describe_differences(many)
    assert said.count("must be the same") == 3 and said.endswith("; and 6 more differ") and "or set" not in said
    assert agreement._describe_differences([many[0]] * 3) == ""


def refusals_of_runs(folder: str) -> list[str]:
    """What ``train`` says where the second rank has something else."""
    told = []
    is_other = dist.get_rank() == 1

    def start(name: str, *words: str) -> None:
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(len(told))  # they meet at one store, again and again
        fixed = ["model=tiny", "data=files", f"data.paths=[{folder}/text.jsonl]", "tokenizer.vocab_size=300"]
        fixed += ["batch.global_batch_tokens=512", "budget.tokens=5120", "schedule.warmup_steps=1"]
        fixed += ["metrics.wandb=off", "engine.device=cpu", "run.prepare_workers=1", f"run.cache_dir={folder}/cache"]
        config = load([*fixed, "parallel.processes=2", f"run.output_dir={folder}", f"run.name={name}", *words])
        try:
            build.train(config, preflight(config, 2))
            told.append("")
        except ValueError as error:
            told.append(str(error))

    def other(name: str, value: object) -> None:
        with pytest.MonkeyPatch.context() as patch:
            if is_other:
                patch.setattr(build, name, value)
            start(name.strip("_"))

    other("resolve_kernels", lambda asked, device: "liger")
    other("program_hash", lambda: "another")
    other("versions", lambda: {"torch": "1.0"})
    start("settings", *["seed=7", "router=hash"] * is_other)
    other("_texts_here", lambda corpus, sets: {"text of data": "another"})
    other("prepare_corpora", refuse)
    return told


def refuse(*_: object) -> NoReturn:
    raise ValueError("data.paths: it does not exist")


def test_a_run_of_ranks_that_differ_is_refused_before_anything_is_built(tmp_path: Path):
    """Each would train on what it has, and the one that writes would put its own settings on record."""
    rows = "".join(f'{{"text": "document {number} says {number**2} {number**3}"}}\n' for number in range(900))
    (tmp_path / "text.jsonl").write_text(rows)
    first, second = run_on_ranks(refusals_of_runs, 2, str(tmp_path))
    host = socket.gethostname()
    assert first[:5] == second[:5]
    assert second[5] == "data.paths: it does not exist" and first[5] == f"rank 1 ({host}): {second[5]}"
    assert f"engine.kernels must be the same on every rank, and is torch on rank 0 ({host}) and liger on" in first[0]
    assert (
        first[1].startswith("files of moe_pretrain must be the same on every rank, and is ") and "another" in first[1]
    )
    assert "version of torch must be the same on every rank, and is " in first[2] and "1.0 on rank 1" in first[2]
    assert f"seed must be the same on every rank, and is 0 on rank 0 ({host}) and 7 on rank 1" in first[3]
    assert "router." in first[3] and "or set seed" in first[3]
    assert first[4].startswith("text of data must be the same on every rank, and is ") and "another" in first[4]
