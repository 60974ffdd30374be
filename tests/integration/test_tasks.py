"""Tasks of lm-evaluation-harness while a run trains, and of its checkpoint afterwards."""

import json
import signal
import time
from pathlib import Path

import pytest
from helpers.pages import read_page
from helpers.runs import STEPS, files_of_step, rows_of, run, start, train_words
from helpers.tasks import NAMES, write_tasks

EVERY = "evaluation.tasks.every_steps=4"


def results_file(home: Path, name: str, step: int) -> Path:
    return home / "outputs" / name / "task_results" / f"step_{step:08d}.json"


def values(home: Path, name: str) -> list[tuple[int, dict[str, float]]]:
    rows = rows_of(home, name, "tasks")
    return [(row["step"], {key: row[key] for key in row if key.startswith("tasks/")}) for row in rows]


@pytest.fixture(scope="module")
def asked(home: Path) -> Path:
    """A run that is asked tasks, and the same without."""
    names = ",".join(write_tasks(home / "my_tasks"))
    (home / "words").write_text(f"evaluation.tasks.names=[{names}]")
    for name, more in (("asked", [(home / "words").read_text(), EVERY, "run.report=true"]), ("plain", [])):
        code, _, err = run(home, *train_words(name, *more))
        assert code == 0, err
    return home


def test_a_run_that_is_asked_has_the_bits_of_one_that_is_not(asked: Path):
    assert files_of_step(asked, "asked", STEPS) == files_of_step(asked, "plain", STEPS)
    assert [row["train/loss"] for row in rows_of(asked, "asked")] == [
        row["train/loss"] for row in rows_of(asked, "plain")
    ]
    assert [step for step, _ in values(asked, "asked")] == [4, 8, 12] and not rows_of(asked, "plain", "tasks")
    first, *_, last = (found["tasks/prose/bits_per_byte"] for _, found in values(asked, "asked"))
    assert last < first - 0.1 and {key.split("/")[1] for key in values(asked, "asked")[0][1]} == set(NAMES)
    page = read_page(asked / "outputs" / "asked" / "report.html").text
    at = page.index("Tasks")
    assert "word_perplexity" in page[at : at + 40] and "Tasks in training" in page


@pytest.mark.slow
def test_tasks_that_a_signal_cuts_short_are_asked_at_the_resume(asked: Path):
    words = (asked / "words").read_text()
    stop = ["fault.point=evaluate.tasks", "fault.action=stop", "fault.step=4"]
    process = start(asked, *train_words("cut", words, EVERY, *stop))
    deadline = time.monotonic() + 100
    while (Path("/proc") / str(process.pid) / "stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    while process.poll() is None and time.monotonic() < deadline:
        process.send_signal(signal.SIGCONT)  # it stops again at every batch
        time.sleep(0.05)
    out, err = process.communicate(timeout=10)
    assert process.returncode == 75 and "stopped at step 4" in out, (out, err)
    assert not rows_of(asked, "cut", "tasks") and not results_file(asked, "cut", 4).exists()
    code, _, err = run(asked, "train", "run.name=cut", "fault.point=null")
    assert code == 2 and "whose templates and python would be run" in err, "a folder of anybody runs nothing"
    for _ in range(2):
        code, _, err = run(asked, "train", "run.name=cut", words, "fault.point=null")
        assert code == 0, err
        assert values(asked, "cut") == values(asked, "asked")


@pytest.mark.slow
def test_ranks_that_share_experts_come_to_the_same_answers(asked: Path):
    two = ["parallel.processes=2", "parallel.expert_parallel_size=2"]
    code, _, err = run(asked, *train_words("two", (asked / "words").read_text(), EVERY, *two))
    assert code == 0, err
    for (step, ours), (other, theirs) in zip(values(asked, "two"), values(asked, "asked"), strict=True):
        assert step == other and ours == pytest.approx(theirs, rel=5e-3)


def test_evaluate_on_any_number_of_processes_is_what_training_found(asked: Path):
    file = results_file(asked, "asked", STEPS)
    recorded = json.loads(file.read_text())
    names = ",".join(f"my_tasks/{name}.yaml" for name in NAMES)
    for processes in (1, 2):
        file.unlink()
        code, out, err = run(asked, "evaluate", "outputs/asked", f"tasks={names}", f"--processes={processes}")
        assert code == 0, err
        assert json.loads(file.read_text()) == recorded
        assert out.count("prose, bits_per_byte") == 1 and str(file.relative_to(asked)) in out


def test_a_task_that_is_not_there_is_refused_before_the_corpus(asked: Path):
    for names, fragment in (
        ("my_tasks/fact.yaml", "evaluation.tasks.names=my_tasks/fact.yaml must be a task file that exists"),
        ("my_tasks/facts.jsonl", "no task file can be read"),
    ):
        code, out, err = run(asked, *train_words("refused", f"evaluation.tasks.names=[{names}]", "data.paths=[no]"))
        assert code == 2 and fragment in err and len(err.strip().splitlines()) == 1, err
