"""A run of an earlier release: its settings, defaults of that day included, win over the defaults of this one."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_pretrain.commands.train import with_earlier_overrides
from moe_pretrain.config.compose import folder_override
from moe_pretrain.config.earlier_releases import BEFORE, BEFORE_OF_CORPORA, completed
from moe_pretrain.config.load import load
from moe_pretrain.config.recorded import allowed_router_file, earlier_words, words_at_start
from moe_pretrain.config.schema import Config, ConfigError, to_values
from moe_pretrain.sweep.job_record import JobState, SweepJob
from moe_pretrain.sweep.planned_jobs import Sweep
from moe_pretrain.train.resume_rules import changes

FILES = ("data=files", "data.paths=[text/*.txt]")


def recorded(*words: str) -> dict[str, Any]:
    """What a release wrote that had other defaults, and none of the fields that came since."""
    values = plain(load(words))
    for name in BEFORE:
        *parts, field = name.split(".")
        part_of = values
        for part in parts:
            part_of = part_of[part]
        del part_of[field]
    for field in BEFORE_OF_CORPORA[values["data"]["source"]]:
        values["data"].pop(field, None)
    values["evaluation"]["max_rows"] = 99
    values["data"]["validation_fraction"] = 0.125
    return values


def plain(config: Config) -> dict[str, Any]:
    return json.loads(json.dumps(to_values(config)))


def run_of_before(folder: Path, *words: str) -> list[str]:
    words = (*words, "run.name=old", f"run.output_dir={folder}")
    (folder / "old").mkdir()
    (folder / "old" / "overrides.txt").write_text("".join(f"{word}\n" for word in words))
    (folder / "old" / "config.yaml").write_text(yaml.safe_dump(recorded(*words)))
    return ["run.name=old", f"run.output_dir={folder}"]


def test_a_run_keeps_the_defaults_of_its_day(tmp_path: Path):
    named = run_of_before(tmp_path, *FILES, "seed=3")
    then = yaml.safe_load((tmp_path / "old" / "config.yaml").read_text())
    for again in (named, [*named, *FILES]):  # the same command again names nothing new
        config = load(with_earlier_overrides(again))
        assert config.evaluation.max_rows == 99 and config.data.validation_fraction == 0.125
        assert config.model.init == "normal" and config.data.near_duplicates == "ignore" and config.seed == 3
        found = changes(copy.deepcopy(then), to_values(config))
        assert not found.refused and all("not known then" in word for word in found.allowed)


@pytest.mark.parametrize(
    ("scheme", "balance"),
    [("router=sinkhorn", "routes"), ("router=expert_choice", "routes"), ("router.load_balance_weight=0", "routes")]
    + [("router=top_k", "cost")],
)
def test_what_costs_did_not_move_goes_on_without_them(tmp_path: Path, scheme: str, balance: str):
    """``balance=cost`` was the default beside every router, and some did not heed it."""
    words = (*FILES, "experts=unequal", scheme)
    named = run_of_before(tmp_path, *words, "model.moe.experts.balance=routes")
    record = tmp_path / "old" / "config.yaml"
    then = yaml.safe_load(record.read_text())
    then["model"]["moe"]["experts"] = {
        **plain(load(("experts=unequal",)))["model"]["moe"]["experts"],
        "balance": "cost",
    }
    del then["parallel"]["overlap_exchange"]
    record.write_text(yaml.safe_dump(then))
    overrides = tmp_path / "old" / "overrides.txt"
    overrides.write_text(overrides.read_text().replace("model.moe.experts.balance=routes\n", ""))
    config = load(with_earlier_overrides(named))
    assert to_values(config)["model"]["moe"]["experts"]["balance"] == balance
    assert not changes(then, to_values(config)).refused


def test_new_words_win_and_are_judged(tmp_path: Path):
    named = run_of_before(tmp_path, *FILES)
    then = yaml.safe_load((tmp_path / "old" / "config.yaml").read_text())
    default = load(FILES).data.validation_fraction
    config = load(
        with_earlier_overrides([*named, f"data.validation_fraction={default}", "optimizer.learning_rate=1e-5"])
    )
    assert config.optimizer.learning_rate == 1e-5 and config.evaluation.max_rows == 99
    assert changes(then, to_values(config)).refused == [f"data.validation_fraction={default} must stay 0.125"]


def test_words_that_were_added_are_the_same_words_next_time(tmp_path: Path):
    named = run_of_before(tmp_path, *FILES)
    words = with_earlier_overrides(named)
    (tmp_path / "old" / "overrides.txt").write_text("".join(f"{word}\n" for word in words))
    (tmp_path / "old" / "config.yaml").write_text(yaml.safe_dump(plain(load(words))))
    assert with_earlier_overrides(named) == words


def test_a_run_whose_words_are_lost_does_not_become_one_of_the_defaults(tmp_path: Path):
    named = run_of_before(tmp_path, *FILES)
    (tmp_path / "old" / "overrides.txt").unlink()
    with pytest.raises(
        ValueError, match=r"^[^\n]*old/overrides.txt is missing, with which the run was started: put it"
    ):
        with_earlier_overrides(named)
    assert with_earlier_overrides([*named, *FILES]) == [*named, *FILES]


def test_another_choice_leaves_the_fields_of_the_first_behind(tmp_path: Path):
    named = run_of_before(tmp_path, *FILES, "schedule=warmup_stable_decay", "schedule.decay_fraction=0.2")
    then = yaml.safe_load((tmp_path / "old" / "config.yaml").read_text())
    config = load(with_earlier_overrides([*named, "data=builtin", "schedule=cosine"]))
    assert config.schedule.name == "cosine"
    assert changes(then, to_values(config)).refused == ["data.source=builtin must stay files"]
    same = load(with_earlier_overrides([*named, "data=files"]))  # the same choice again keeps them
    assert same.data.paths == load(FILES).data.paths and same.schedule.decay_fraction == 0.2


def test_a_forced_name_is_a_name(tmp_path: Path):
    (name, folder) = run_of_before(tmp_path, *FILES, "seed=3")
    assert load(with_earlier_overrides([f"++{name}", f"++{folder}"])).seed == 3


def test_the_built_in_corpus_of_before_is_refused(tmp_path: Path):
    named = run_of_before(tmp_path)
    with pytest.raises(ConfigError, match=r"data: the built-in corpus is another text in this release.*run\.name"):
        with_earlier_overrides(named)


@pytest.mark.parametrize("source", BEFORE_OF_CORPORA)
def test_a_record_is_completed_with_every_field_that_it_lacks(source: str):
    more = {
        "files": FILES[1:],
        "tokens": (FILES[1], "tokenizer=pretrained", "tokenizer.path=x"),
        "hub": ("data.name=a",),
    }.get(source, ())
    values = recorded(f"data={source}", *more)
    assert completed(values)["data"].keys() == to_values(load([f"data={source}", *more]))["data"].keys()


def test_a_sweep_goes_on_with_the_defaults_of_its_day(tmp_path: Path):
    sweep = Sweep(tmp_path / "s", FILES, "cache", load().sweep)
    (job,) = sweep.plan([["router=top_p"]])
    SweepJob(job.folder, 0, job.words, job.num_steps, recorded(*job.words)).write()
    JobState("stopped").write(job.folder)
    for _ in range(2):
        (again,) = Sweep(tmp_path / "s", FILES, "cache", load().sweep).plan([["router=top_p"]])
        config = load(again.words)
        assert again.folder == job.folder and config.evaluation.max_rows == 99 and config.model.init == "normal"
        assert again.values["evaluation"]["max_rows"] == 99
    with pytest.raises(ValueError, match=r"was started with other settings: seed=7 \(was 0\)"):
        Sweep(tmp_path / "s", (*FILES, "seed=7"), "cache", load().sweep).plan([["router=top_p"]])


def test_the_folder_says_where_a_run_lies_and_not_its_record(tmp_path: Path):
    recorded = ["run.output_dir=/gone", "++run.name='other'", "seed=3"]
    for folder in (tmp_path / "copy", Path("copy")):
        config = load(earlier_words(folder, recorded, []))
        assert config.run.folder == folder and config.seed == 3
        config = load(earlier_words(folder, recorded, ["seed=4"]))
        assert config.run.folder == folder and config.seed == 4
    assert load(earlier_words(tmp_path / "x", recorded, ["run.name=y", f"run.output_dir={tmp_path}"])).run.name == "y"


STRANGE = [
    "router_file=a.py",
    "++router_file=a.py",
    "model.hidden_size=${oc.env:HOME}",
    "run.cache_dir='${oc.env:HOME}'",
    "hydra.searchpath=[pkg://evil]",
    "hydra.job.name=x",
    "hydra/launcher=submitit_local",
    "model=../../evil",
]


@pytest.mark.parametrize("word", STRANGE)
def test_what_a_folder_may_not_ask_for_is_asked_of_the_command_line(tmp_path: Path, word: str):
    with pytest.raises(ConfigError) as refused:
        earlier_words(tmp_path / "run", ["seed=3", word], ["seed=4"])
    assert f"names {word}" in str(refused.value) and f"give {word} on the command line too" in str(refused.value)
    assert word in earlier_words(tmp_path / "run", ["seed=3", word], [word])
    key = word.split("=")[0]
    assert word not in words_at_start(tmp_path / "run", [word], [f"{key}=null"])


def test_a_yaml_file_that_a_folder_leads_to_evaluates_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    file = tmp_path / "own" / "experiment" / "mine.yaml"
    words = [folder_override(tmp_path / "own"), "experiment=mine"]
    monkeypatch.setenv("SECRET", "7")
    for text, is_refused in (("seed: ${model.num_layers}", False), ("seed: ${oc.env:SECRET}", True)):
        file.write_text(f"# @package _global_\n{text}\n")
        if is_refused:
            with pytest.raises(ConfigError, match=r"seed=\$\{oc.env:SECRET\} is not evaluated"):
                earlier_words(tmp_path / "run", words, [])
        else:
            assert load(earlier_words(tmp_path / "run", words, [])).seed == 4
    assert load(words).seed == 7, "a command may"


@pytest.mark.parametrize(
    "recorded,given,chosen",
    [
        (None, ["router_file=a.py"], None),
        ("/there/a.py", ["router_file=here/a.py"], "here/a.py"),
        ("/there/a.py", ["router_file=b.py"], "b.py"),
        ("/there/a.py", ["router_file=b/a.py", "router_file=/there/a.py"], "/there/a.py"),
        ("/there/a.py", ["router_file=b.py", "router_file=x/a.py"], "x/a.py"),
    ],
)
def test_the_router_file_of_a_run_is_one_that_the_command_names(recorded: str, given: list[str], chosen: str):
    assert allowed_router_file(recorded, given, "run") == chosen


@pytest.mark.parametrize("given", [[], ["router_file=b.py", "router_file=c.py"]])
def test_without_one_of_its_own_it_is_refused(given: list[str]):
    with pytest.raises(ConfigError, match="run names router_file=a.py, python that would be run"):
        allowed_router_file("a.py", given, "run")


@pytest.mark.parametrize("damage", ["budget", "data", "evaluation"])
def test_a_record_that_is_no_configuration_is_one_line(tmp_path: Path, damage: str):
    named = run_of_before(tmp_path, *FILES)
    file = tmp_path / "old" / "config.yaml"
    values = yaml.safe_load(file.read_text())
    for wrong in (None, [], "x"):
        file.write_text(yaml.safe_dump({**values, damage: wrong}))
        with pytest.raises(ConfigError, match="recorded configuration is damaged"):
            with_earlier_overrides(named)


def test_a_policy_that_no_row_has_met_may_change():
    def values(policy: str) -> dict:
        return json.loads(json.dumps(to_values(load([*FILES, f"data.invalid_text={policy}"]))))

    found = changes(values("fail"), values("skip"))
    assert not found.refused and found.allowed == ["data.invalid_text=skip (was fail)"]
    assert changes(values("skip"), values("fail")).refused == ["data.invalid_text=fail must stay skip"]
