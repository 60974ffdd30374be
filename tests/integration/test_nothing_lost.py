"""What a run does when its checkpoints cannot be used, its folder is a copy, or it comes from a stranger."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.checkpoints import rewrite_manifest
from helpers.runs import rows_of, run, train_words

STRANGER = "import os\nos.mkdir('let_in')\n"


@pytest.fixture(scope="module")
def trained(home: Path) -> Path:
    """The folder of a finished run."""
    code, _, err = run(home, *train_words("first", "budget.tokens=4096", "checkpoint.every_steps=2"))
    assert code == 0, err
    return home / "outputs" / "first"


def copy(trained: Path, name: str) -> Path:
    return Path(shutil.copytree(trained, trained.parent / name))


def files_of(folder: Path) -> dict[str, bytes]:
    kept = [path for path in folder.rglob("*") if path.is_file() and "stacks" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept if path.name != "owner.lock"}


def damage(folder: Path) -> None:
    for file in folder.glob("checkpoints/step_*/rank_00000.safetensors"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


def of_later_release(folder: Path) -> None:
    for path in folder.glob("checkpoints/step_*"):
        rewrite_manifest(path, lambda manifest: manifest.update(format_version=2))


def gone(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoints")


def rename(folder: Path) -> None:
    paths = sorted(folder.glob("checkpoints/step_*"))
    for path in paths[:-1]:
        shutil.rmtree(path)
    paths[-1].rename(paths[-1].with_name("step_00000009"))


@pytest.mark.parametrize(
    "spoil,fragment",
    [
        (damage, "has 2 checkpoints and none that this run can go on from: "),
        (of_later_release, "format_version=2, this program reads 1: go on with the release that wrote it"),
        (gone, "is empty, but metrics.jsonl tells of a checkpoint of step 4"),
        (rename, "holds step 4 and was renamed: its name must be step_00000004"),
    ],
)
def test_a_finished_run_without_a_usable_checkpoint_is_refused_until_asked(
    trained: Path, spoil: Callable[[Path], None], fragment: str
) -> None:
    name = f"spoilt-{spoil.__name__}"
    folder, home = copy(trained, name), trained.parent.parent
    spoil(folder)
    before = files_of(folder)
    for more in ([], ["budget.tokens=8192"]):
        code, _, err = run(home, "train", f"run.name={name}", *more)
        assert code == 2 and fragment in err and len(err.splitlines()) == 1, err
        assert files_of(folder) == before
    code, out, err = run(home, "train", f"run.name={name}", "checkpoint.resume=restart", "budget.tokens=2048")
    assert code == 0 and "starting" in out, err
    aside = files_of(folder / "checkpoints" / "set_aside")
    kept = {file.removeprefix("checkpoints/"): content for file, content in before.items() if "checkpoints/" in file}
    assert aside == {**kept, "metrics.jsonl": before["metrics.jsonl"]}
    assert "restarted" in {row["event"] for row in rows_of(home, name, "event")}
    assert "checkpoint.resume=restart" not in (folder / "overrides.txt").read_text()
    (folder / "checkpoints" / "step_00000002" / "manifest.json").unlink()
    code, _, err = run(home, "train", f"run.name={name}")
    assert code == 2 and "none that this run can go on from" in err, "restart was for one start"


def test_a_copy_is_the_run_where_it_lies(trained: Path, tmp_path: Path) -> None:
    home = trained.parent.parent
    words = train_words("placed", "budget.tokens=2048", "run.output_dir=elsewhere", "run.cache_dir=outputs/cache")
    code, _, err = run(home, *words)
    assert code == 0, err
    original = home / "elsewhere" / "placed"
    shutil.copytree(original, home / "outputs" / "moved")
    before = files_of(original)
    code, out, err = run(home, "train", "run.name=moved", "budget.tokens=4096", "run.report=true")
    assert code == 0 and "run folder: outputs/moved" in out, err
    assert files_of(original) == before and rows_of(home, "moved")[-1]["step"] == 4
    assert "<h1>moved</h1>" in (home / "outputs" / "moved" / "report.html").read_text()
    code, out, err = run(home, "specialise", "outputs/moved")
    assert code == 0 and "step_00000004 of moved" in out, err
    assert files_of(original) == before and (home / "outputs" / "moved" / "specialisation.json").exists()


@pytest.mark.parametrize(
    "word", ["router_file=stranger.py", "run.cache_dir=${oc.env:HOME}", "hydra.searchpath=[pkg://stranger]"]
)
@pytest.mark.parametrize("command", ["train", "certify"])
def test_a_received_folder_runs_and_evaluates_nothing(trained: Path, word: str, command: str) -> None:
    home = trained.parent.parent
    (home / "stranger.py").write_text(STRANGER)
    name = f"received-{command}-{word.partition('=')[0]}"
    folder = copy(trained, name)
    with (folder / "overrides.txt").open("a") as file:
        file.write(f"{word}\n")
    words = ["train", f"run.name={name}"] if command == "train" else [command, f"outputs/{name}"]
    code, _, err = run(home, *words)
    assert code == 2 and f"names {word}" in err and f"give {word} on the command line too" in err, err
    assert len(err.splitlines()) == 1 and not (home / "let_in").exists()


def test_a_received_configuration_runs_nothing(trained: Path) -> None:
    home = trained.parent.parent
    (home / "stranger.py").write_text(STRANGER)
    folder = copy(trained, "configured")
    file = folder / "config.yaml"
    file.write_text(file.read_text().replace("router_file: null", "router_file: stranger.py"))
    code, _, err = run(home, "specialise", "outputs/configured")
    assert code == 2 and "give router_file=stranger.py on the command line too" in err and len(err.splitlines()) == 1
    assert not (home / "let_in").exists()
    code, _, err = run(home, "specialise", "outputs/configured", "router_file=stranger.py")
    assert code == 2 and "must define one dataclass" in err
    assert (home / "let_in").exists(), "asked for by name, it is run"
    (home / "let_in").rmdir()
    file.write_text(file.read_text().replace("max_rows: 16", "max_rows: ${oc.env:HOME}"))
    code, _, err = run(home, "train", "run.name=configured")
    assert code == 2 and "${oc.env:HOME}" in err and "evaluated" in err and len(err.splitlines()) == 1


def test_a_state_that_is_not_this_run_is_refused_in_one_line(trained: Path) -> None:
    home = trained.parent.parent
    changes: list[tuple[str, object, str]] = [
        ("tokens", 5, "state.tokens=5 must be 4096 after its steps"),
        ("config", {"engine": [], "model": 3}, "must stay"),
        ("stream", {"epoch": 0}, "the checkpoint is of a run whose data was streamed"),
        ("corpus_fingerprint", "other", "the corpus has changed"),
        ("token_hash", None, "cannot be resumed"),
    ]
    folder = copy(trained, "hostile")
    manifest = folder / "checkpoints" / "step_00000004" / "manifest.json"
    good = manifest.read_text()
    facts = {"corpus_facts": {"files": [], "sources": 3}}
    for name, value, fragment in changes:
        manifest.write_text(good)
        more = facts if name == "corpus_fingerprint" else {}
        rewrite_manifest(
            manifest.parent, lambda m, name=name, value=value, more=more: m["state"].update({name: value, **more})
        )
        code, _, err = run(home, "train", "run.name=hostile")
        assert code == 2 and fragment in err and len(err.splitlines()) == 1, (name, err)
    manifest.write_text(good)
    assert json.loads(good)["state"]["step"] == 4
