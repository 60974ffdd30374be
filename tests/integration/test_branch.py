"""``checkpoint.branch_from`` as a user runs it."""

import contextlib
import io
import os
import shutil
from pathlib import Path
from typing import BinaryIO

import pytest
from helpers.checkpoints import assert_same, contents
from helpers.processes import run_on_ranks
from helpers.runs import rows_of, run, train_words

from moe_pretrain import cli
from moe_pretrain.checkpoint import manifest

STABLE = ("schedule=warmup_stable_decay", "schedule.decay_fraction=0", "router=loss_free", "optimizer=muon")
DECAY = ("budget.tokens=8192", "schedule.decay_fraction=0.5")


@pytest.fixture(scope="module")
def trunk(home: Path) -> Path:
    """A stable run of eight steps that has kept those of 4 and 8."""
    code, _, err = run(home, *train_words("trunk", *STABLE), "budget.tokens=8192", "checkpoint.keep_last=5")
    assert code == 0, err
    return home


def test_a_branch_is_the_run_to_that_budget_alone(trunk: Path) -> None:
    """Weights, moments, balancers' biases, losses and rates: to the bit, from the first step of the branch on."""
    code, _, err = run(trunk, *train_words("alone", *STABLE), *DECAY)
    assert code == 0, err
    code, _, err = run(trunk, *train_words("branch", *STABLE, "checkpoint.branch_from=trunk@4"), *DECAY)
    assert code == 0, err
    whole, own = ({row["step"]: row for row in rows_of(trunk, name)} for name in ("alone", "branch"))
    assert sorted(own) == [5, 6, 7, 8]
    assert (
        own[8]["train/learning_rate"]
        == 0
        < own[5]["train/learning_rate"]
        < rows_of(trunk, "trunk")[4]["train/learning_rate"]
    )
    same = [key for key in own[5] if "second" not in key and "wait" not in key and key not in ("attempt", "kind")]
    assert len(same) > 10 and "data/token_hash" in same and "train/flops_spent" in same
    for step, row in own.items():
        assert {key: row[key] for key in same} == {key: whole[step][key] for key in same}
    assert_same(contents(trunk / "outputs/alone/checkpoints"), contents(trunk / "outputs/branch/checkpoints"))
    (event,) = [row for row in rows_of(trunk, "branch", "event") if row["event"] == "branched"]
    assert "from " in event["message"] and "trunk/checkpoints/step_00000004; changed: " in event["message"]
    assert "schedule.decay_fraction=0.5 (was 0" in event["message"]
    (event,) = [row for row in rows_of(trunk, "trunk", "event") if row["event"] == "branched_off"]
    assert event["step"] == 4 and event["message"].endswith("branch goes on from step_00000004")
    # The branch goes on from its own checkpoints, and its beginning stays what it was.
    code, _, err = run(trunk, "train", "run.name=branch", "checkpoint.branch_from=null")
    assert code == 2 and "checkpoint.branch_from=null must stay trunk@4" in err


@pytest.mark.parametrize(
    "words,fragment",
    [
        (["checkpoint.branch_from=trunk"], "checkpoint.branch_from=trunk must be RUN@STEP"),
        (["checkpoint.branch_from=nowhere@4"], "must be the folder of a run"),
        (["checkpoint.branch_from=trunk@5"], "step 5 was not kept, outputs/trunk has 4, 8; checkpoint.keep"),
        (["checkpoint.branch_from=trunk@4", "model.num_layers=3"], "model.num_layers=3 must stay 2, with which"),
        (["checkpoint.branch_from=trunk@4", "router=top_k"], "router.name=top_k must stay loss_free"),
        (["checkpoint.branch_from=trunk@4", "optimizer=adamw"], "optimizer.name=adamw must stay muon"),
        (["checkpoint.branch_from=trunk@4", "tokenizer.vocab_size=400"], "tokenizer.vocab_size=400 must stay"),
        (["checkpoint.branch_from=trunk@4", "data.validation_fraction=0.2"], "data.validation_fraction=0.2 must stay"),
        (["checkpoint.branch_from=trunk@8"], "the run comes to 8 steps, which must be more than the 8 of"),
        (["checkpoint.branch_from=trunk@4", "checkpoint.warm_start=outputs/trunk"], "must be null with"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(trunk: Path, words: list[str], fragment: str) -> None:
    code, _, err = run(trunk, *train_words("never", *STABLE, *DECAY, *words))
    assert code == 2 and fragment in err and len(err.splitlines()) == 1, err
    assert not (trunk / "outputs" / "never").exists()


def branch_here(home: str, words: list[str]) -> tuple[int, str, list[str]]:
    """The command on a rank of torchrun's: exit code, errors, and the checkpoint files that this rank has hashed."""
    os.chdir(home)
    hash_of, hashed = manifest._hash, []

    def recorded(file: BinaryIO) -> str:
        hashed.append(Path(os.readlink(f"/proc/self/fd/{file.fileno()}")).name)
        return hash_of(file)

    manifest._hash = recorded
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        code = cli.main(words)
    return code, errors.getvalue(), hashed


def test_ranks_together_read_the_checkpoint_once(trunk: Path) -> None:
    """By the start of the branch: not each rank the whole of it beforehand."""
    words = train_words("read_once", *STABLE, "checkpoint.branch_from=trunk@4", "checkpoint.every_steps=100")
    ranks = run_on_ranks(branch_here, 2, str(trunk), [*words, *DECAY])
    assert [code for code, _, _ in ranks] == [0, 0], ranks
    assert sum((hashed for _, _, hashed in ranks), []) == ["rank_00000.safetensors"]


def test_a_damaged_checkpoint_ends_every_rank_in_one_line(trunk: Path) -> None:
    """The rank that has read the damaged file tells the others, which would wait for it."""
    shutil.copytree(trunk / "outputs/trunk", trunk / "outputs/damaged")
    file = trunk / "outputs/damaged/checkpoints/step_00000004/rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    words = train_words("never_begun", *STABLE, "checkpoint.branch_from=damaged@4", *DECAY)
    for code, err, _ in run_on_ranks(branch_here, 2, str(trunk), words):
        assert code == 2 and len(err.splitlines()) == 1, err
        assert "damaged/checkpoints/step_00000004/rank_00000.safetensors is damaged: its size or hash" in err
    assert not (trunk / "outputs/never_begun/checkpoints").exists(), "nothing was trained"
