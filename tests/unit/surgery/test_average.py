"""The mean of checkpoints: every tensor against the mean of the models, and what is refused."""

from pathlib import Path

import pytest
import torch
from helpers.trained import tiny_run

from moe_pretrain import cli
from moe_pretrain.checkpoint.manifest import BUFFER, UPDATES
from moe_pretrain.config.trained import TrainedRun, open_trained


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("average")


def opened(folder: Path) -> TrainedRun:
    return open_trained(folder, lambda file: file, pytest.fail)


@pytest.mark.parametrize(
    "words", [("router=loss_free",), ("router=hash",), ("router=k_means",)], ids=lambda w: w[0][7:]
)
def test_every_tensor_is_the_mean(words: tuple[str, ...], home: Path, capsys: pytest.CaptureFixture):
    name = words[0][7:]
    for step in (2, 3, 4):
        run = tiny_run(home, name, *words, step=step, seed=step)
    (run / "overrides.txt").write_text("model=tiny\n")
    assert cli.main(["average", str(run), "--last=2", "--debug"]) == 0
    assert "the mean of the steps 4, 3" in capsys.readouterr().out
    models = [opened(run / "checkpoints" / f"step_0000000{step}").model() for step in (4, 3)]
    found = opened(home / f"{name}-average")
    assert (found.folder / "overrides.txt").read_text() == "model=tiny\n"
    averaged = found.model()
    for own, *others in zip(*(model.named_parameters() for model in (averaged, *models)), strict=True):
        values = torch.stack([other.detach().double() for _, other in others])
        assert torch.equal(own[1], values.mean(dim=0).float()), own[0]
        assert not torch.equal(others[0][1], others[1][1]) or "norm" in own[0]
    for own, *others in zip(*(model.named_buffers() for model in (averaged, *models)), strict=True):
        expected = torch.stack([other for _, other in others]).double().mean(dim=0)
        if not own[1].is_floating_point():
            expected = others[0][1]
        assert torch.equal(own[1], expected.to(own[1])), own[0]
    reader = found.reader()
    assert {kind for _, kind in reader.arrays()} == {"weight", "exp_avg", "exp_avg_sq", BUFFER}
    assert set(reader.read("norm.weight", "exp_avg", 0, 16).tolist()) == {4.5}, "moments are the newest one's"
    assert found.state.step == 4 and found.manifest[UPDATES] == 4 and found.state.validation_loss is None


def test_what_cannot_be_averaged_is_one_line(home: Path, capsys: pytest.CaptureFixture):
    run = tiny_run(home, "few", "router=top_k", step=1)
    tiny_run(home, "few", "router=top_k", step=2)

    def refusal(*words: str) -> str:
        assert cli.main(["average", str(run), *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "--last=5 must be at most 2" in refusal()
    assert "--last=1 must be at least 2" in refusal("--last=1")
    assert "must be empty or not exist" in refusal("--last=2", f"--to={home}")
    tiny_run(home, "few", "router=top_k", "model.moe.num_experts=6", step=3)
    assert "is of another model" in refusal("--last=2")
    (run / "checkpoints" / "step_00000002" / "rank_00000.safetensors").write_bytes(b"x")
    assert "step_00000002/rank_00000.safetensors is damaged" in refusal("--last=2")
    assert not list(home.glob("few-average*"))
