"""``evaluate``: every token is predicted once, and from what."""

import json
import math
from pathlib import Path

import pytest
import torch
from helpers.tasks import write_tasks
from helpers.trained import tiny_run
from lm_eval.tasks._index import Entry, Kind

from moe_pretrain import cli
from moe_pretrain.config.trained import TrainedRun, open_trained
from moe_pretrain.data.tokenizer.load import load_tokenizer_file
from moe_pretrain.data.tokenizer.train import train_tokenizer
from moe_pretrain.huggingface.check import our_logits
from moe_pretrain.inference.corpus_loss import corpus_loss

LENGTH = 40
SHORT, LONG = "The statement executes.", "An assignment evaluates the expression list, naïvely. " * 12


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    folder = tiny_run(tmp_path_factory.mktemp("evaluate"), "run", "router=loss_free")
    return open_trained(folder, lambda file: file, pytest.fail)


def by_hand(run: TrainedRun, text: str) -> tuple[float, int]:
    """Token by token: each from the start of the first window, by half windows, that reaches it."""
    tokenizer, model = load_tokenizer_file(run.folder.parent / "tokenizer.json"), run.model()
    ids = [*map(int, tokenizer.encode_batch([text])[0]), tokenizer.end_of_document]
    nats = 0.0
    for target in range(1, len(ids)):
        first = 0
        while target - first > LENGTH:
            first += LENGTH // 2
        before = torch.tensor([ids[first:target]])
        nats -= float(our_logits(model, before)[0, -1].double().log_softmax(0)[ids[target]])
    return nats, len(ids) - 1


def test_every_token_is_predicted_once_from_half_a_window_or_more(run: TrainedRun):
    tokenizer = load_tokenizer_file(run.folder.parent / "tokenizer.json")
    texts = [SHORT, "", LONG]
    found = corpus_loss(run.model(), tokenizer, texts)
    expected = [by_hand(run, text) for text in (SHORT, LONG)]
    assert expected[1][1] > 3 * LENGTH
    assert found.tokens == sum(tokens for _, tokens in expected) and found.documents == 2
    assert found.nats == pytest.approx(sum(nats for nats, _ in expected), rel=1e-5)
    assert found.text_bytes == len((SHORT + LONG).encode()) > len(SHORT + LONG)
    assert found.bits_per_byte == pytest.approx(found.nats / math.log(2) / found.text_bytes)


def test_the_command_prints_a_row_for_each_file(run: TrainedRun, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "one.txt").write_text(LONG)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in (LONG, SHORT)))
    files = [str(tmp_path / "one.txt"), str(tmp_path / "rows.jsonl")]
    words = ["evaluate", str(run.folder)]
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": LONG}) + "\n")
    assert cli.main([*words, files[0], str(tmp_path / "one.jsonl"), "--debug"]) == 0
    _, plain, row = capsys.readouterr().out.splitlines()
    nats, tokens = by_hand(run, LONG)
    assert plain.split()[:5] == row.split()[:5] and plain.split()[0] == "1"
    assert float(plain.split()[2]) == pytest.approx(nats / tokens, abs=1e-3)
    assert cli.main([*words, files[1], "--column=body", "--max-documents=1"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:5] == row.split()[:5]


@pytest.mark.parametrize(
    "words,fragment",
    [
        (["missing.txt"], "must be a file that exists"),
        (["rows.jsonl"], "has no text 'text' in line 1"),
        (["latin.txt"], "must be UTF-8"),
        (["empty.txt"], "holds no text"),
        (["empty.txt", "--max-documents=0"], "--max-documents=0"),
        ([], "or tasks=NAME a task"),
        (["latin.txt", "--num-fewshot=1"], "--num-fewshot is of tasks"),
        (["tasks=no/task.yaml"], "tasks=no/task.yaml must be a task file that exists"),
        (["tasks=facts.yaml,"], "without empty names"),
        (
            ["tasks=lost.yaml"],
            "tasks=lost.yaml: dataset_kwargs.data_files=rows.json must be a file that exists, beside",
        ),
        (["tasks=broken.yaml"], "tasks=broken.yaml: no task file can be read"),
        (["tasks=column.yaml"], "tasks=column.yaml cannot be loaded: UndefinedError"),
        (["tasks=facts.yaml", "--num-fewshot=-1"], "--num-fewshot=-1 must be at least 0"),
        (["tasks=facts.yaml", "--tokenizer=other/tokenizer.json"], "does not belong to this run"),
    ],
)
def test_mistakes_are_one_line(run: TrainedRun, words, fragment, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"body": "x"}\n')
    Path("latin.txt").write_bytes("é".encode("latin-1"))
    Path("empty.txt").touch()
    Path("broken.yaml").write_text("task: [")
    facts = Path(write_tasks(tmp_path)[0]).read_text()
    Path("lost.yaml").write_text(facts.replace("facts.jsonl", "rows.json"))
    Path("column.yaml").write_text(facts.replace("{{question}}", "{{quest}}"))
    Path("other").mkdir()
    train_tokenizer(iter([facts] * 9), 270, Path("other/tokenizer.json"))
    assert cli.main(["evaluate", str(run.folder), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert fragment in line


def test_a_loss_by_another_rule_says_so_and_one_that_looks_ahead_is_refused(tmp_path: Path, capsys):
    (tmp_path / "text.txt").write_text("The statement executes.")
    choosing = tiny_run(tmp_path, "choosing", "router=expert_choice")
    assert cli.main(["evaluate", str(choosing), str(tmp_path / "text.txt")]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "router=expert_choice decides here by its evaluation rule: a token takes the experts" in line
    words = ("router=attention_importance", "router.importance=received", "router.allow_non_causal=true")
    ahead = tiny_run(tmp_path, "ahead", *words)
    assert cli.main(["evaluate", str(ahead), str(tmp_path / "text.txt")]) == 2
    out, err = capsys.readouterr()
    assert "is not that of a language model" in err and not out


def test_without_the_extra_the_line_says_how_to_install_it(run: TrainedRun, capsys, monkeypatch, tmp_path: Path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["evaluate", str(run.folder), f"tasks={write_tasks(tmp_path)[0]}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert 'pip install "moe_pretrain[evaluate]"' in line


def test_a_task_that_nobody_knows_has_its_likes_named(run: TrainedRun, capsys, monkeypatch):
    known = {name: Entry(name, Kind.TASK, None) for name in ("hellaswag", "arc_easy")}  # of 14,000, to be quick
    monkeypatch.setattr("lm_eval.tasks.manager.TaskIndex.build", staticmethod(lambda paths: known))
    assert cli.main(["evaluate", str(run.folder), "tasks=hellaswagg"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "tasks=hellaswagg must be a task of the harness or a task file; there are hellaswag" in line
