"""Folders of transformers that are read: what would make their weights another function is refused."""

import json
from pathlib import Path

import pytest
from helpers.trained import tiny_run

from moe_pretrain import cli
from moe_pretrain.config.schema import ConfigError
from moe_pretrain.config.trained import open_trained
from moe_pretrain.huggingface.folder import HuggingFaceFolder


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    home = tmp_path_factory.mktemp("folder")
    run = tiny_run(home, "dense", "router=dense")
    assert cli.main(["export", str(run), str(home / "llama"), "--no-check"]) == 0
    return run, home / "llama"


OLD = {"rope_parameters": None}
"""Releases before the fifth have other names for the rotary positions, and the oldest call their kind ``type``."""
REFUSED = {
    "rope_type=linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    "rope_type=yarn": {**OLD, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
    "rope_type=dynamic": {**OLD, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "hidden_act=gelu": {"hidden_act": "gelu"},
    "sliding_window=8": {"sliding_window": 8},
    "clip_qkv=5.0": {"clip_qkv": 5.0},
}


@pytest.mark.parametrize("word", REFUSED)
def test_what_this_model_has_not_is_refused(word: str, exported: tuple[Path, Path]):
    run, folder = exported
    model = open_trained(run, lambda file: file, pytest.fail).config.model
    values = json.loads((folder / "config.json").read_text())
    HuggingFaceFolder(folder).check(model, "field")
    changed = {key: value for key, value in (values | REFUSED[word]).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(changed))
    try:
        with pytest.raises(ConfigError, match=f"^field=.* has {word}, which this model has not$"):
            HuggingFaceFolder(folder).check(model, "field")
    finally:
        (folder / "config.json").write_text(json.dumps(values))
