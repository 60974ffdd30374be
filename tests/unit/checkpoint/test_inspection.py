"""What ``inspect`` prints, against numbers worked out here, and its exit codes."""

import json
import math
import struct
from pathlib import Path

import pytest
from helpers.checkpoints import rewrite_manifest, write_checkpoint

from moe_pretrain.cli import main

FACTS = {
    "config": {
        "model": {"name": "tiny"},
        "router": {"name": "top_k"},
        "optimizer": {"name": "muon"},
        "parallel": {"expert_parallel_size": 2},
        "engine": {"zero_stage": 1},
    },
    "world_size": 4,
    "versions": {"torch": "2.11.0"},
    "corpus_fingerprint": "abc",
    "validation_loss": 3.25,
}


def test_a_good_checkpoint_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write_checkpoint(tmp_path, 3, **FACTS)
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    for fragment in (
        "format version 1",
        "step:        3\n",
        "tokens:      24\n",
        "validation:  3.25",
        "4 ranks, expert parallel 2, ZeRO 1",
        "tiny, router top_k, optimizer muon\n",
        "torch 2.11.0",
        "11 parameters in 2 tensors",
        "verified, 1 files",
    ):
        assert fragment in out
    value = struct.unpack("<f", bytes([3]) * 4)[0]
    rows = {
        words[0]: [float(word) for word in words[1:]]
        for line in out.splitlines()
        if (words := line.split())[0] in ("layers.0", "norm")
    }
    assert rows["layers.0"] == pytest.approx([math.sqrt(6) * value] * 3, rel=1e-5)
    assert rows["norm"] == pytest.approx([math.sqrt(5) * value] * 3, rel=1e-5)


@pytest.mark.parametrize(
    "engine, ranks, resolved, line",
    [
        (
            {"zero_stage": "auto", "device": "auto", "dtype": "auto"},
            1,
            {"zero_stage": 0, "device": "cpu", "dtype": "float32", "kernels": "torch"},
            "1 ranks, expert parallel 2, ZeRO 0, cpu, float32, kernels torch\n",
        ),
        ({"zero_stage": "auto", "device": "cpu", "dtype": "auto"}, 4, {}, "ZeRO 1, cpu, auto, kernels not recorded\n"),
        (
            {"zero_stage": "auto"},
            1,
            {},
            "ZeRO auto, which is 0 in float32 and 1 in bfloat16, not recorded, not recorded, kernels not recorded\n",
        ),
    ],
)
def test_what_auto_became_is_printed(tmp_path: Path, capsys, engine: dict, ranks: int, resolved: dict, line: str):
    facts = {**FACTS, "config": {**FACTS["config"], "engine": engine}, "world_size": ranks, "resolved": resolved}
    assert main(["inspect", str(write_checkpoint(tmp_path, 3, **facts))]) == 0
    assert line in capsys.readouterr().out


def test_damage_is_named_and_gives_another_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write_checkpoint(tmp_path, 3, **FACTS)
    file = path / "rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert main(["inspect", str(path)]) == 1
    out = capsys.readouterr().out
    assert "DAMAGED" in out and str(file) in out and "verified" not in out


def test_values_that_are_not_finite_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write_checkpoint(tmp_path, 255, **FACTS)  # 0xffffffff is NaN
    assert main(["inspect", str(path)]) == 1
    assert "not finite: weight of layers.0.weight" in capsys.readouterr().out


def test_a_file_that_is_right_by_hash_and_no_safetensors_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    import xxhash

    path = write_checkpoint(tmp_path, 3, **FACTS)
    junk = json.dumps({"not": "safetensors"}).encode() * 50
    (path / "rank_00000.safetensors").write_bytes(junk)
    facts = {"bytes": len(junk), "xxh3_128": xxhash.xxh3_128_hexdigest(junk)}
    rewrite_manifest(path, lambda manifest: manifest["files"].update({"rank_00000.safetensors": facts}))
    assert main(["inspect", str(path)]) == 1
    assert "rank_00000.safetensors" in capsys.readouterr().out


def test_what_is_no_checkpoint_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write_checkpoint(tmp_path / "run" / "checkpoints", 3)
    assert main(["inspect", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert f"did you mean {path}?" in err and len(err.splitlines()) == 1
    assert main(["inspect", str(path.parent / "step_00000004")]) == 2
    err = capsys.readouterr().err
    assert f"there is no such folder; did you mean {path}?" in err and len(err.splitlines()) == 1
    (tmp_path / "file").touch()
    assert main(["inspect", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.endswith("is no checkpoint: it is a file\n")
    assert main(["inspect", str(tmp_path / "nowhere")]) == 2
