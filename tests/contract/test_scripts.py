"""Every script starts and comes to its end on the smallest input; what the READMEs say of scripts is so."""

import argparse
import csv
import json
import os
import re
import runpy
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from helpers import parity
from helpers.parity import Case
from helpers.runs import run, run_script, train_words

from moe_pretrain.config.load import load
from moe_pretrain.run_folder.record import load_rows
from moe_pretrain.verify.verify import QuantityCheck

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
READMES = sorted(path for path in ROOT.rglob("README.md") if not {".venv", "outputs", "build"} & set(path.parts))
FILES = {str(path.relative_to(SCRIPTS)) for kind in ("*.py", "*.sh", "*.sbatch") for path in SCRIPTS.rglob(kind)}

SMALL_MODEL = [
    *("model.num_layers=2", "model.hidden_size=32", "model.vocab_size=512", "model.sequence_length=64"),
    *("model.moe.expert_hidden_size=32", "batch.global_batch_tokens=256", "batch.micro_batch_size=2"),
]
SMALL_RUNS = [
    *("model.num_layers=2", "model.moe.expert_hidden_size=32", "model.vocab_size=512"),
    *("tokenizer.vocab_size=512", "data=files", "data.paths=[{home}/corpus.jsonl]", "data.validation_fraction=0.1"),
    *("evaluation.max_rows=8", "metrics.log_every_steps=1", "schedule.warmup_steps=1"),
]
SMALLEST: dict[str, tuple[list[str], list[str]]] = {
    "bench/bench_checkpoint.py": (
        ["--rounds=1", "--steps=1", "--folder={home}", "model=tiny", *SMALL_MODEL],
        ["speed against torch.save", "bytes per parameter"],
    ),
    "bench/bench_data.py": (
        ["--seconds=0.05", "--tokens=300000", "--prepare-megabytes=2", "--workers=1", "--train-steps=2"],
        ["prepare, 1 processes", "training waits for data", "our loader with masks, prefetch thread"],
    ),
    "bench/bench_layer.py": (
        ["--cpu-clock", "--rounds=1", "--tokens=64", "--hidden=64", "--width=64"],
        [
            "\nmoe_pretrain ",
            "\nmoe_pretrain, router=uniform, experts=unequal ",
            "times as fast as without the others; 2.00 is the limit",
            "\nOLMoE grouped_mm ",
            "\nDeepSpeed MoE, no drop ",
        ],
    ),
    "bench/bench_product.py": (
        ["--steps=1", *SMALL_MODEL],
        [
            "tokens per step in 2 micro-batches",
            "\nkernels of a micro-batch ",
            "\nGB beside products, of a micro-batch ",
        ],
    ),
    "bench/bench_step.py": (
        ["--cpu-clock", "--rounds=1", *SMALL_MODEL],
        ["\nmoe_pretrain ", "\ndense twin ", "\ntransformers Mixtral "],
    ),
    "durability/chaos_sweep.py": (
        ["--kills=1", "--tokens=12288", "--jobs=1", "--schemes", "top_k", "hash", "--folder={home}"]
        + ["--overrides", *SMALL_RUNS],
        ["killed ", "6 runs of 3 steps, each step once", "planted mistake found, twin not distinguishable"],
    ),
    "tables/coordinate_check.py": (
        ["--values", "32", "64", "--inits", "mup", "--steps", "0", "1", "--rows=1", "--schemes", "hash", "relu"]
        + ["--picture={home}/coordinates.png", *SMALL_MODEL[:1], *SMALL_MODEL[2:4]],
        ["| relu, mup | sum of weights | ", "| hash, mup | logits | "],
    ),
    "tables/rate_transfer.py": (
        ["--folder={home}/transfer", "--values", "32", "64", "--inits", "mup", "--rates", "0.001", "0.01"]
        + ["--steps=2", "--rows=1", "--picture={home}/transfer.png"],
        ["mup width=64 rate 0.01 seed 1: ", "| mup | 32 | "],
    ),
    "durability/fire.py": (
        ["--hits=2", "--seed=1", "--folder={home}"],
        ["2 hits (", "every step once; token hash and loss of every step"],
    ),
    "durability/two_starts.py": (
        ["--rounds=1", "--steps=60", "--folder={home}"],
        ["1 runs started twice at once: one trained and one was refused"],
    ),
    "tables/certificate_table.py": (["--schemes", "hash"], ["| `hash` | pass | pass |"]),
    "tables/learning_table.py": (
        ["--folder={home}/learning", "--steps=2", "--jobs=1", "--trials=4", "--seeds", "1"]
        + ["--also", "optimizer.groups.experts.lr_scale=0.5"]
        + ["--schemes", "random", "top_k", "--overrides", *SMALL_RUNS],
        ["10 jobs: 10 finished", "| `top_k` | ", " | 1.00 | 1.00 | ", "8,192 training tokens", "DOES NOT BEAT RANDOM"]
        + ["4 trials of each scheme's learning rate and optimizer.groups.experts.lr_scale=0.5 with seed 100"],
    ),
    "tables/start_table.py": ([*SMALL_MODEL, "--schemes", "hash"], ["| `top_k` | 1.00 | 1.00 |", "| `hash` | "]),
}
"""Of each script, the words that make it short, and what it must print."""
ELSEWHERE = {
    "check.sh": "contract/test_scripts.py",
    "durability/chaos.py": "integration/test_durability.py",
    "durability/signal_storm.py": "integration/test_durability.py",
    "durability/two_hosts.py": "integration/test_two_hosts.py",
    "environment.sh": "contract/test_scripts.py",
    "gpu_check.sh": "contract/test_scripts.py",
    "parity.sh": "contract/test_scripts.py",
    "quickstart.sh": "contract/test_scripts.py",
    "slurm/local_cluster.sh": "helpers/slurm.py",
    "slurm/train.sbatch": "integration/test_slurm.py",
    "tables/parity.py": "contract/test_scripts.py",
    "tables/pruning_table.py": "contract/test_scripts.py",
    "test.sh": "contract/test_scripts.py",
}
"""Scripts that other tests start, with the file that does."""
PARTS = {"bench/bench_tools.py", "durability/attempts.py"}
"""What scripts import."""


def test_every_script_is_started_by_a_test():
    assert set(SMALLEST) | set(ELSEWHERE) | PARTS == FILES
    for script, test in ELSEWHERE.items():
        assert Path(script).name in (ROOT / "tests" / test).read_text()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scripts")
    rows = "".join(json.dumps({"text": topics[name]}) + "\n" for name in sorted(topics))
    (folder / "corpus.jsonl").write_text(rows)
    return folder


@pytest.mark.parametrize("script", SMALLEST)
@pytest.mark.fast("bench/bench_layer.py", "tables/start_table.py")
def test_a_script_comes_to_its_end(home: Path, script: str):
    words, expected = SMALLEST[script]
    code, out, err = run_script(home, SCRIPTS / script, *(word.format(home=home) for word in words))
    assert code == 0, out[-3000:] + err[-3000:]
    for text in expected:
        assert text in out, out[-3000:]
    if script == "tables/learning_table.py":
        _require_runs_of_table(home / "learning" / "learning.csv", out)


def _require_runs_of_table(path: Path, table: str) -> None:
    """Of two schemes four trials and a final run at the best of them, whose loss is the table's."""
    runs = list(csv.DictReader(path.read_text().splitlines()))
    assert len(runs) == 10
    for scheme in ("top_k", "random"):
        trials = {
            row["setting"]: float(row["validation loss"])
            for row in runs
            if (row["scheme"], row["run"]) == (scheme, "trial")
        }
        (final,) = (row for row in runs if (row["scheme"], row["run"]) == (scheme, "final"))
        assert len(trials) == 4 and final["setting"] == min(trials, key=trials.__getitem__) and final["seed"] == "1"
        assert f"| `{scheme}` | {float(final['validation loss']):.3f} | " in table


RUNS = ["learning_runs.csv", "learning_wide_runs.csv"]


def test_the_learning_table_is_of_the_runs_that_are_kept():
    """Of every scheme, five trials and three final runs at the best of them, with that rate and their mean loss."""
    runs = list(csv.DictReader((SCRIPTS / "assets" / RUNS[0]).read_text().splitlines()))
    readme = (SCRIPTS / "README.md").read_text()
    schemes = runpy.run_path(str(SCRIPTS / "tables" / "learning_table.py"))["SCHEMES"]
    assert {row["scheme"] for row in runs} == schemes.keys()
    for scheme in schemes:
        own = [row for row in runs if row["scheme"] == scheme]
        trials = {row["setting"]: float(row["validation loss"]) for row in own if row["run"] == "trial"}
        finals = [row for row in own if row["run"] == "final"]
        best = min(trials, key=trials.__getitem__)
        assert len(trials) == 5 and [(row["setting"], row["seed"]) for row in finals] == [(best, s) for s in "123"]
        mean = statistics.fmean(float(row["validation loss"]) for row in finals)
        assert min(map(float, trials)) < float(best) < max(map(float, trials)), "no best rate lies at an edge"
        (line,) = (line for line in readme.splitlines() if line.startswith(f"| `{scheme}` | {mean:.3f} ["))
        assert f" | {best} | " in line


def test_the_table_at_twice_the_width_is_of_the_runs_that_are_kept():
    """Three runs of every scheme, at the rate that was the best of the first three at the other size."""
    lines = (SCRIPTS / "README.md").read_text().splitlines()
    kept = {name: list(csv.DictReader((SCRIPTS / "assets" / name).read_text().splitlines())) for name in RUNS}
    trials = [
        row for row in kept[RUNS[0]] if row["setting"] in ("0.0113", "0.0226", "0.0452") and row["run"] == "trial"
    ]
    trials.sort(key=lambda row: float(row["validation loss"]), reverse=True)
    rates = {row["scheme"]: row["setting"] for row in trials}
    wide = kept[RUNS[1]]
    assert {(row["scheme"], row["setting"]) for row in wide} == set(rates.items()) and len(wide) == 3 * len(rates)
    for scheme in rates:
        mean = statistics.fmean(float(row["validation loss"]) for row in wide if row["scheme"] == scheme)
        assert any(line.startswith(f"| `{scheme}` | {mean:.3f} [") for line in lines), scheme


def test_the_table_of_pruning(home: Path):
    """Of a short run: a row for each method, tuned by as many steps, SEER's with another loss."""
    words = [
        "budget.tokens=2048",
        "evaluation.max_rows=8",
        f"run.output_dir={home}",
        f"data.paths=[{home}/corpus.jsonl]",
    ]
    code, _, err = run(home, *train_words("pruned", *words))
    assert code == 0, err
    words = [f"{home}/pruned", "--experts=2", "--steps=2", f"--folder={home}/fewer", "--methods", "seer"]
    words += ["--entropy-weights", "5.0", "--rows=4", "--overrides", "optimizer.learning_rate=0.01"]
    code, out, err = run_script(home, SCRIPTS / "tables" / "pruning_table.py", *words)
    assert code == 0, out[-3000:] + err[-3000:]
    rows = {cells[1].strip(): cells[2:5] for line in out.splitlines()[2:] if (cells := line.split("|"))[1:]}
    assert list(rows) == ["(not pruned)", "`seer`", "`seer, entropy 5.0`"]
    before, after, tuned = ([float(row[place]) for row in rows.values()] for place in range(3))
    assert len(set(before)) == 1 and after[0] == before[0] and after[1] == after[2] and len(set(tuned)) == 3
    assert all(now < then for now, then in zip(tuned, after, strict=True))
    (row, *_) = load_rows(home / "fewer" / "seer-entropy-5.0-tuned")["train"]
    assert row["aux/entropy_weight"] == 5.0 and row["aux/entropy_loss"] > 0


@pytest.mark.parametrize("error,code", [(0.0, 0), (1.0, 1)])
def test_the_table_of_parity(error: float, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """The cases themselves are run by ``distributed/test_parity.py``."""
    asked: list[Case] = []

    def run_cases(cases: list[Case], timeout: float) -> dict[Case, list[QuantityCheck]]:
        asked.extend(cases)
        return {case: [QuantityCheck("loss", "step 1", error, 0.5)] for case in cases}

    monkeypatch.setattr(parity, "run_cases", run_cases)
    monkeypatch.setattr(sys, "argv", ["parity.py", "2x2", "bfloat16", "--covering"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPTS / "tables" / "parity.py"), run_name="__main__")
    assert end.value.code == code
    assert {(case.ranks, case.expert_parallel_size, case.dtype) for case in asked} == {(2, 2, "bfloat16")}
    out = capsys.readouterr().out
    assert f"2x2 bfloat16    {len(asked):>5} {error:19.1e}" in out
    assert out.count("DIFFERS") == code * len(asked) and ("the same as the oracle everywhere" in out) == (not code)


@pytest.mark.parametrize("words", [["3x3"], ["2x2", "4x4"]], ids=str)
def test_a_line_that_parity_has_not_is_an_error(words: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parity, "run_cases", None)
    monkeypatch.setattr(sys, "argv", ["parity.py", *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPTS / "tables" / "parity.py"), run_name="__main__")
    assert end.value.code == 2


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the shell scripts with a finished environment, whose commands say what they were asked."""
    (tmp_path / "scripts").mkdir()
    for script in SCRIPTS.glob("*.sh"):
        (tmp_path / "scripts" / script.name).write_text(script.read_text())
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    commands = tmp_path / ".venv" / "bin"
    commands.mkdir(parents=True)
    for name in ("python", "moe-pretrain", "ruff", "mypy"):
        (commands / name).write_text(
            f'#!/bin/bash\n[ "$1" = -c ] || echo "{name} $*"\n[ -z "$FAILING" ] || [ "$*" != "$FAILING" ]\n'
        )
        (commands / name).chmod(0o755)
    (commands / "activate").write_text(f"PATH={commands}:$PATH\n")
    return tmp_path


def shell(checkout: Path, script: str, *words: str, **variables: str) -> tuple[int, str, str]:
    command = ["bash", str(checkout / "scripts" / script), *words]
    # Workers are those of these tests' own run.
    environment = {name: value for name, value in os.environ.items() if name != "TEST_WORKERS"}
    done = subprocess.run(command, cwd="/", env={**environment, **variables}, text=True, capture_output=True)
    return done.returncode, done.stdout, done.stderr


EVERY_TEST = "python -m pytest -m not gpu -n 3 --dist loadfile --no-loadscope-reorder"
FAST_TESTS = EVERY_TEST.replace("not gpu", "not gpu and not slow")


@pytest.mark.parametrize(
    "script,words,said",
    [
        ("quickstart.sh", ["budget.tokens=5"], ["moe-pretrain train run.name=quickstart budget.tokens=5"]),
        ("parity.sh", ["4x2", "bfloat16"], ["python scripts/tables/parity.py 4x2 bfloat16"]),
        ("test.sh", ["tests/unit"], [f"{FAST_TESTS} tests/unit"]),
        ("test.sh", ["--all", "tests/unit"], [f"{EVERY_TEST} tests/unit"]),
        ("check.sh", [], ["ruff format --check .", "ruff check .", "mypy ", f"{EVERY_TEST} "]),
    ],
)
def test_a_shell_script_makes_the_environment_once_and_starts_its_command(
    checkout: Path, script: str, words: list[str], said: list[str]
):
    code, out, err = shell(checkout, script, *words)
    installing, *commands = [line.strip() for line in out.splitlines() if line.strip()]
    assert code == 0 and installing.startswith("installing moe_pretrain") and not err
    assert commands == [line.strip() for line in said]
    code, out, _ = shell(checkout, script, *words)
    assert code == 0 and "installing" not in out, "nothing has changed"


def test_an_environment_that_cannot_be_made_is_one_error(checkout: Path):
    extras = "-m pip install --quiet --disable-pip-version-check -e ."
    code, out, err = shell(checkout, "quickstart.sh", FAILING=extras)
    assert code == 1 and "moe-pretrain" not in out
    assert err.splitlines()[-1] == "error: pip install failed; its last lines are above"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, which the script would use for minutes")
def test_the_gpu_check_without_a_gpu_is_one_error():
    done = subprocess.run(
        ["bash", str(SCRIPTS / "gpu_check.sh")],
        env={**os.environ, "PYTHON": sys.executable},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 1
    assert done.stderr == f"error: {sys.executable} finds no CUDA device\n" and not done.stdout


@pytest.mark.parametrize(("devices", "gib"), [(1, 80), (2, 141)])
def test_the_gpu_check_makes_one_table_within_its_time(checkout: Path, devices: int, gib: int):
    """Of what its parts print, with a python that only says that there are GPUs."""
    printed = {"pytest": "15 passed", "bench_product": "seconds  1.5  2.5\nkernels of a micro-batch  2000  1900"}
    cases = "".join(f"*{name}*) printf '{text}\n';; " for name, text in printed.items())
    python = checkout / "python"
    python.write_text(f'#!/bin/bash\ncase "$*" in -c*) printf "H\\t{gib}\\t{devices}\\n";; {cases} *) false;; esac\n')
    python.chmod(0o755)
    code, out, _ = shell(checkout, "gpu_check.sh", PYTHON=str(python))
    table = dict(re.split(r"  +", line.strip(), maxsplit=1) for line in out.partition("---")[2].splitlines()[1:])
    assert code == 1, "the other benchmarks have failed, and are in the table"
    assert f"{devices} x H, {gib} GiB" in out and table["GPU tests"] == "15 passed"
    assert table["layer"] == "FAILED, see outputs/gpu_check/layer.log"
    assert table["product, 700m: s a step"] == "1.5" and table["kernels of a micro-batch"] == "2000"
    assert table["planned"] == "2.5" and table["counted without a GPU"] == "1900"
    assert ("product, 700m, 2 GPUs, EP 2: s a step" in table) == (devices == 2)
    assert ("step, 4b" in table) == (gib < 100)
    limits = [int(seconds) for seconds in re.findall(r"^ *part (\d+) ", (SCRIPTS / "gpu_check.sh").read_text(), re.M)]
    assert len(limits) == 6 and sum(limits) < 8 * 60


@pytest.mark.parametrize("script", sorted(script for script in FILES if not script.endswith(".py")))
def test_shell_scripts_parse(script: str):
    done = subprocess.run(["bash", "-n", str(SCRIPTS / script)], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def readme_commands() -> list[str]:
    """Commands that start a script, in code blocks and between backticks."""
    text = "\n".join(path.read_text() for path in READMES).replace("\\\n", " ")
    found = re.findall(r"(?:python|bash|sbatch|^|`)\s*(scripts/[\w/]+\.(?:py|sh|sbatch)[^`\n]*)", text, re.MULTILINE)
    return sorted({re.split(r"\s+# ", command)[0].strip() for command in found})


def test_files_of_scripts_that_readmes_name_exist():
    for path in READMES:
        for name in re.findall(r"scripts/[\w/]*[\w.]+", path.read_text()):
            assert (ROOT / name.rstrip(".")).exists(), f"{path.relative_to(ROOT)} names {name}"
    for name in re.findall(r"^\| (`.*?`(?:, `.*?`)*) \|", (SCRIPTS / "README.md").read_text(), re.MULTILINE):
        for one in re.findall(r"`([\w/]+(?:\.sh|/))`", name):
            assert (SCRIPTS / one).exists(), f"scripts/README.md names {one}"


ALL_TESTS = ("scripts/test.sh", "--all")


class _Parsed(Exception):
    """The command line was taken."""


@pytest.mark.parametrize("command", readme_commands())
def test_readme_commands_are_taken(command: str, monkeypatch: pytest.MonkeyPatch):
    script, *words = shlex.split(command)
    if not script.endswith(".py"):
        load([word for word in words if "=" in word])
        assert all("=" in word or (ROOT / word).exists() or (script, word) == ALL_TESTS for word in words)
        return
    parse = argparse.ArgumentParser.parse_args

    def parsed(parser: argparse.ArgumentParser, *given: object) -> None:
        parse(parser, *given)  # type: ignore[call-overload]
        raise _Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    monkeypatch.setattr(sys, "argv", [script, *words])
    monkeypatch.syspath_prepend(str((ROOT / script).parent))
    with pytest.raises(_Parsed):
        runpy.run_path(str(ROOT / script), run_name="__main__")
