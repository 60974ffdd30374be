"""SIGKILL in the middle of a run, for schemes that have more to keep than a linear router: it goes on as it was."""

from pathlib import Path

import pytest
from helpers.runs import files_of_step, rows_of, run, train_words

SHORT = (
    *("budget.tokens=5120", "checkpoint.every_steps=2", "checkpoint.keep_last=9", "evaluation.every_steps=100"),
    *("model.num_layers=1", "batch.micro_batch_size=16"),
)
SCHEMES = {
    "thor": ("router=thor",),
    "smear": ("router=smear",),
    "lory": ("router=lory", "router.segment_tokens=16"),
    "moe_plus_plus": ("router=moe_plus_plus",),
    "k_means": ("router=k_means", "router.rule=least_squares", "router.refit_every_steps=1"),
    "unequal": ("router=loss_free", "experts=unequal", "model.moe.experts.pattern=[1,3]"),
    "orthogonal": ("router=top_k", "combine=orthogonal"),
    "coupled": ("router=top_k", "router.expert_router_coupling_weight=1", "model.moe.latent_size=16"),
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.fast("moe_plus_plus")
def test_a_killed_run_ends_with_the_bits_of_one_that_was_not(scheme: str, home: Path):
    words = (*SCHEMES[scheme], *SHORT)
    code, _, err = run(home, *train_words(f"{scheme}-straight", *words))
    assert code == 0, err
    killed = f"{scheme}-killed"
    code, _, _ = run(home, *train_words(killed, *words, "fault.point=train.step", "fault.action=kill", "fault.step=3"))
    assert code == -9 and rows_of(home, killed)[-1]["step"] < 5
    assert not (home / "outputs" / killed / "checkpoints" / "step_00000004").exists()
    code, _, err = run(home, "train", f"run.name={killed}", "fault.point=null")
    assert code == 0, err
    ours, theirs = (files_of_step(home, f"{scheme}-{kind}", 5) for kind in ("killed", "straight"))
    assert ours == theirs and ours
    losses = [[row["train/loss"] for row in rows_of(home, f"{scheme}-{kind}")] for kind in ("killed", "straight")]
    assert losses[0] == losses[1] and len(losses[0]) == 5
    assert max(row["attempt"] for row in rows_of(home, killed)) == 1
