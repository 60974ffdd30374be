"""``generate`` as a user types it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.trained import tiny_run

from moe_pretrain import cli
from moe_pretrain.commands import generate
from moe_pretrain.config.trained import open_trained
from moe_pretrain.data.tokenizer.load import load_tokenizer_file
from moe_pretrain.huggingface.check import our_logits

TEXT = "The statement"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    tiny_run(folder, "top_k", "router=top_k")
    tiny_run(folder, "choice", "router=expert_choice")
    return folder


def test_prints_what_the_model_goes_on_with(home: Path, capsys: pytest.CaptureFixture):
    assert cli.main(["generate", str(home / "top_k"), TEXT, "--temperature=0", "--max-tokens=6", "--debug"]) == 0
    tokenizer = load_tokenizer_file(home / "tokenizer.json")
    model = open_trained(home / "top_k", lambda file: file, pytest.fail).model()
    ids = torch.tensor(tokenizer.encode_batch([TEXT]))
    prompt = ids.shape[1]
    for _ in range(6):
        ids = torch.cat([ids, our_logits(model, ids)[:, -1:].argmax(dim=-1)], dim=1)
    out, err = capsys.readouterr()
    assert (out, err) == (TEXT + tokenizer.decode(ids[0, prompt:].tolist()) + "\n", "")


def test_says_by_which_rule_and_where_it_ends(home: Path, capsys: pytest.CaptureFixture):
    assert cli.main(["generate", str(home / "choice"), TEXT, "--max-tokens=1000", "--seed=1"]) == 0
    err = capsys.readouterr().err
    assert "router=expert_choice decides here by its evaluation rule: a token takes the experts whose running" in err
    assert "the model was trained on 40 in a row" in err


def test_self_contrast_is_another_text(home: Path, capsys: pytest.CaptureFixture):
    texts = []
    for words in ([], ["decode=self_contrast", "--beta=0"], ["decode=self_contrast", "--beta=20", "--alpha=0.0001"]):
        assert cli.main(["generate", str(home / "top_k"), TEXT, "--temperature=0", "--max-tokens=20", *words]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def replay(tokens: list[int]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Chooses the tokens that it was given."""
    left = list(tokens)
    return lambda ids: torch.tensor([[left.pop(0)]])


def test_characters_come_whole_and_the_end_of_a_document_ends(home: Path):
    tokenizer = load_tokenizer_file(home / "tokenizer.json")
    text = "naïve 東京"
    tokens = [int(token) for token in tokenizer.encode_batch([text])[0]]
    assert len(tokens) > len(text)
    parts = list(generate._texts(replay([*tokens, tokenizer.end_of_document, 5]), tokenizer, [1], 99, "cpu"))
    assert "".join(parts) == text and not any("\ufffd" in part for part in parts) and len(parts) > 5
    cut = list(generate._texts(replay(tokens), tokenizer, [1], len(tokens) - 1, "cpu"))
    assert "".join(cut).startswith("naïve 東") and cut[-1].endswith("\ufffd"), "what is left is not kept back"


@pytest.mark.parametrize(
    "words,fragment",
    [
        (["decode=best"], "decode=best must be one of sample, self_contrast"),
        (["--max-tokens=0"], "--max-tokens=0"),
        (["--top-p=2"], "--top-p=2.0"),
        (["decode=self_contrast", "--weak-ranks=x"], "--weak-ranks=x must be numbers"),
        (["decode=self_contrast", "--weak-ranks=5"], "must be at most the 4 experts"),
        (["seed=3"], "beside a folder of runs only router_file=PATH"),
    ],
)
def test_mistakes_are_one_line(home: Path, words: list[str], fragment: str, capsys: pytest.CaptureFixture):
    assert cli.main(["generate", str(home / "top_k"), TEXT, *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert fragment in line


def test_a_text_that_is_empty_or_too_long(home: Path, capsys: pytest.CaptureFixture):
    for text in ("", TEXT * 30):
        assert cli.main(["generate", str(home / "top_k"), text]) == 2
        assert "must have 1 to 39" in capsys.readouterr().err
