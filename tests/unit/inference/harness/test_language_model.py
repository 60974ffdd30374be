"""The model for the harness: request by request what the harness's own ``hf`` model says of the exported folder."""

import socket
from pathlib import Path

import pytest
from helpers.tasks import NAMES, write_tasks
from helpers.trained import tiny_run
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from moe_pretrain import cli
from moe_pretrain.config.schema import ConfigError
from moe_pretrain.config.trained import TrainedRun, open_trained
from moe_pretrain.data.tokenizer.load import load_tokenizer_file
from moe_pretrain.inference.harness.evaluate_tasks import check_router, evaluate_tasks
from moe_pretrain.inference.harness.language_model import HarnessModel
from moe_pretrain.inference.harness.tasks import load_tasks
from moe_pretrain.inference.harness.text_generation import options_of

SCHEMES = {
    "top_k": ["router=top_k"],
    "expert_choice": ["router=expert_choice", "model.moe.num_shared_experts=1", "model.tie_embeddings=false"],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("harness")


@pytest.fixture(scope="module")
def tasks(home: Path) -> list[str]:
    return write_tasks(home / "tasks")


def open_run(home: Path, name: str, *words: str) -> TrainedRun:
    return open_trained(tiny_run(home, name, *words), lambda file: file, pytest.fail)


def harness_model(run: TrainedRun, batch_tokens: int) -> HarnessModel:
    return HarnessModel(run.model(), load_tokenizer_file(run.folder.parent / "tokenizer.json"), batch_tokens)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_request_and_metric_is_that_of_the_exported_run(home: Path, tasks: list[str], scheme: str):
    run = open_run(home, scheme, *SCHEMES[scheme])
    folder = home / f"{scheme}.exported"
    assert cli.main(["export", str(run.folder), str(folder), "--no-check"]) == 0
    hf = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1, trust_remote_code=True)
    theirs = evaluate(hf, load_tasks("tasks", tasks), bootstrap_iters=10)
    ours = evaluate(harness_model(run, 130), load_tasks("tasks", tasks), bootstrap_iters=0)
    scores = {
        name: [(x["resps"], y["resps"]) for x, y in zip(*(f["samples"][name] for f in (theirs, ours)), strict=True)]
        for name in NAMES
    }
    for his, own in scores["facts"]:
        for (a,), (b,) in zip(his, own, strict=True):
            assert b[0] == pytest.approx(a[0], abs=1e-4) and b[1] == a[1]
    for ((a,),), ((b,),) in scores["prose"]:
        assert b == pytest.approx(a, rel=1e-6)
    texts = [(a, b) for ((a,),), ((b,),) in scores["finish"]]
    assert all(a == b for a, b in texts) and len(set(texts)) > 1
    for name in NAMES:
        for key, value in theirs["results"][name].items():
            if "," in key and "stderr" not in key:
                assert ours["results"][name][key] == pytest.approx(value, rel=1e-5), (name, key)
    for result in evaluate_tasks(harness_model(run, 500), load_tasks("tasks", tasks), None, "by a rule"):
        errors = [(one.error, theirs["results"][result.name][f"{one.name}_stderr,none"]) for one in result.metrics]
        assert result.rule == "by a rule" and result.documents == result.of_documents == len(result.metrics[0].values)
        for error, harness_error in errors:  # of the ratios the harness has none
            assert error is not None and (harness_error == "N/A" or error == pytest.approx(harness_error, rel=1e-5))


def test_local_tasks_ask_nobody_on_the_network(home: Path, tasks: list[str], monkeypatch: pytest.MonkeyPatch):
    asked: list[object] = []  # an error alone could be swallowed

    def refuse(*arguments: object, **options: object) -> None:
        asked.append(arguments)
        raise OSError("no network")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    words = write_tasks(home / "fresh", test_split="test")
    model = harness_model(open_run(home, "offline", "router=top_k"), 200)
    assert {result.name for result in evaluate_tasks(model, load_tasks("tasks", words), 2, "")} == set(NAMES)
    assert not asked


def test_drawn_texts_do_not_depend_on_the_batch_before(home: Path):
    """A seed for each batch: one rank or several draw the same."""
    words = write_tasks(home / "drawn", generation_kwargs={"do_sample": True, "temperature": 1.5, "max_gen_toks": 6})
    model = harness_model(open_run(home, "top_k", "router=top_k"), 120)
    first, second = (evaluate(model, load_tasks("tasks", words[2:]), bootstrap_iters=0) for _ in range(2))
    texts = [[one["resps"] for one in found["samples"]["finish"]] for found in (first, second)]
    assert texts[0] == texts[1]
    greedy = evaluate(model, load_tasks("tasks", write_tasks(home / "greedy")[2:]), bootstrap_iters=0)
    assert texts[0] != [one["resps"] for one in greedy["samples"]["finish"]]


def test_a_group_has_its_tasks_beside_it(home: Path, tasks: list[str]):
    (home / "tasks" / "both.yaml").write_text(
        "group: both\ntask: [facts, prose]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    model = harness_model(open_run(home, "top_k", "router=top_k"), 500)
    results = evaluate_tasks(model, load_tasks("tasks", [str(home / "tasks" / "both.yaml")], 2), 3, "")
    found = {result.name: result for result in results}
    assert found.keys() == {"facts", "prose", "both"} and found["facts"].num_fewshot == 2
    assert [metric.value for metric in found["both"].metrics if metric.name == "acc"] == [
        found["facts"].metrics[0].value
    ]
    assert found["both"].documents == 6 and found["facts"].of_documents > found["facts"].documents == 3


def test_questions_with_other_examples_are_other_questions(home: Path, tasks: list[str]):
    model = harness_model(open_run(home, "top_k", "router=top_k"), 500)
    one, same, two = (
        evaluate_tasks(model, load_tasks("tasks", tasks[:1], shots), None, "")[0].fingerprint for shots in (1, None, 2)
    )
    assert one == same != two


def test_schemes_that_cannot_answer_are_refused(home: Path, tasks: list[str]):
    smear = open_run(home, "smear", "router=smear", "router.evaluation_segment_tokens=8")
    loaded = load_tasks("tasks", tasks)
    assert "segments are merged" in check_router(smear.meta_model(), "smear", loaded)
    acausal = open_run(
        home, "acausal", "router=attention_importance", "router.importance=received", "router.allow_non_causal=true"
    )
    with pytest.raises(ConfigError, match="depend on later tokens"):
        check_router(acausal.meta_model(), "attention_importance", loaded)


@pytest.mark.parametrize(
    "asked,fragment",
    [({"num_beams": 4}, "generation_kwargs.num_beams=4 is not known"), ({}, "max_gen_toks=256 must be 1 to 39")],
)
def test_generation_that_the_model_cannot_do_is_refused(asked, fragment):
    with pytest.raises(ConfigError, match=fragment):
        options_of(asked, 40)
