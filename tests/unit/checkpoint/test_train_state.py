"""The state of a run in a checkpoint: read back as written, and refused field by field where it is wrong."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from helpers.checkpoints import rewrite_manifest, write_checkpoint

from moe_pretrain.checkpoint.manifest import CheckpointError, newest, read_manifest
from moe_pretrain.checkpoint.train_state import RunIdentity, TrainState
from moe_pretrain.schedule.loss_spikes import Rewind, SpikeState

WHOLE = TrainState(
    step=7,
    tokens=700,
    token_hash=-(2**63),
    flops=2**70,
    train_seconds=1.25,
    validation_loss=3.5,
    rewinds=(Rewind(2, 3, 5), Rewind(4, 9, 10)),
    spikes=SpikeState((3.0, 2.5), True),
    stream={"epoch": 0, "rows": None, "checksums": ["a", "b"]},
    identity=RunIdentity(
        config={"seed": 1, "model": {"name": "tiny"}},
        corpus_fingerprint="f",
        corpus_facts={"training tokens": 9},
        tokenizer="t",
        world_size=2,
        versions={"torch": "2.11.0"},
    ),
)


def as_kept(state: TrainState) -> dict[str, Any]:
    return json.loads(json.dumps(state.to_json()))


@pytest.mark.parametrize("state", [WHOLE, TrainState(step=0)])
def test_a_state_is_read_as_it_was_written(state: TrainState) -> None:
    assert TrainState.from_json(as_kept(state)) == state


def test_names_of_a_later_release_are_left_alone() -> None:
    assert TrainState.from_json({**as_kept(WHOLE), "later": math.nan}) == WHOLE


def test_the_names_in_the_file_are_those_of_the_first_release() -> None:
    """Another name would leave every earlier checkpoint behind."""
    assert list(as_kept(WHOLE)) == [
        *("step", "tokens", "token_hash", "flops", "train_seconds", "validation_loss", "rewinds", "spikes", "stream"),
        *("config", "corpus_fingerprint", "corpus_facts", "tokenizer", "world_size", "versions", "resolved"),
    ]
    assert as_kept(WHOLE)["rewinds"][0] == {"step": 2, "first": 3, "stop": 5}
    assert as_kept(WHOLE)["spikes"] == {"losses": [3.0, 2.5], "is_high": True}


WRONG: list[tuple[str, Any]] = [
    *(("step", value) for value in (None, -1, "2", 1.0, True, 2**63)),
    *(("tokens", value) for value in (-1, 1.5, "9", False)),
    *(("token_hash", value) for value in (2**63, -(2**63) - 1, 0.5, "0")),
    *(("flops", value) for value in (-1, 1e9, math.inf, True)),
    *(("train_seconds", value) for value in (-0.1, math.nan, math.inf, "1", True)),
    *(("validation_loss", value) for value in (math.nan, -math.inf, -1.0, "3.1", [3.1])),
    *(("rewinds", value) for value in ({}, [{"step": 1}], [{"step": 1, "first": 3, "stop": 3}], "no")),
    *(("spikes", value) for value in ([], {"losses": [1.0]}, {"losses": [math.nan], "is_high": False})),
    *(("spikes", value) for value in ({"losses": ["1"], "is_high": False}, {"losses": [1.0], "is_high": 1})),
    *(("stream", value) for value in ([], "x", {"tokens": math.nan})),
    *(("config", value) for value in ([], "x")),
    *(("corpus_facts", value) for value in ([], "x")),
    *((name, value) for name in ("corpus_fingerprint", "tokenizer") for value in (1, [], {})),
    *(("world_size", value) for value in (0, -1, 1.0, "2")),
    *(("versions", value) for value in ([], {"torch": 2})),
]


@pytest.mark.parametrize("name,value", WRONG)
def test_a_wrong_field_is_named_with_its_value_and_constraint(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^state.{name}=") as refused:
        TrainState.from_json({**as_kept(WHOLE), name: value})
    assert " must be " in str(refused.value) and "; state." not in str(refused.value)


def test_every_violation_is_said_at_once() -> None:
    wrong = {"step": -1, "flops": math.nan, "versions": []}
    with pytest.raises(ValueError) as refused:
        TrainState.from_json({**as_kept(WHOLE), **wrong})
    said = str(refused.value).split("; state.")
    assert len(said) == 3 and said[0].startswith("state.step=-1 must be a whole number from 0")
    assert said[1].startswith("flops=NaN must be") and said[2].startswith("versions=[] must be")


def test_a_checkpoint_with_a_wrong_state_is_refused(tmp_path: Path) -> None:
    """The manifest has the right hash, so nothing is damaged: the run stops, and goes back behind no step."""
    write_checkpoint(tmp_path, 1)
    path = write_checkpoint(tmp_path, 2)
    rewrite_manifest(path, lambda manifest: manifest["state"].update(train_seconds=math.inf))
    with pytest.raises(CheckpointError, match=r"step_00000002.*state\.train_seconds=Infinity must be a finite number"):
        read_manifest(path)
    with pytest.raises(CheckpointError, match="state.train_seconds"):
        newest(tmp_path, pytest.fail)
