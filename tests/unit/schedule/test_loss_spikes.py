"""Spikes of the loss, and what a run that went back reads."""

import random
from pathlib import Path

import pytest

from moe_pretrain.config.load import load
from moe_pretrain.config.schema import ConfigError
from moe_pretrain.run_folder.rewinds import read_rewinds, write_rewinds
from moe_pretrain.schedule.loss_spikes import Rewind, Rewinds, SpikeConfig, SpikeDetector

CONFIG = SpikeConfig(window_steps=5, deviations=4.0, nats=0.5, rewind=True, skip_steps=1, max_rewinds=3)
CALM = [3.0, 3.1, 2.9, 3.0, 3.05]


def judged(losses: list[float]) -> list[int]:
    """The steps in which a spike begins."""
    detector = SpikeDetector(CONFIG)
    return [step for step, loss in enumerate(losses) if detector.judge(loss)]


@pytest.mark.parametrize(
    "more,expected",
    [
        ([3.4], []),  # 4 deviations of 1.4826 x 0.05 are 0.30, but 0.5 nats are asked for
        ([3.51], [5]),
        ([9.0, 9.0, 3.0, 9.0], [5, 8]),  # a stretch is one spike
        ([float("nan"), 3.6], [6]),
        ([2.0], []),  # downwards is no spike
    ],
)
def test_a_spike_is_far_above_the_median_of_the_window(more: list[float], expected: list[int]) -> None:
    assert judged([*CALM, *more]) == expected


def test_nothing_is_judged_before_the_window_is_full_and_wide_windows_are_patient() -> None:
    assert judged([1.0, 9.0, 1.0, 9.0, 1.0]) == []
    assert judged([1.0, 3.0, 1.0, 3.0, 2.0, 7.5]) == []  # 4 deviations are 4 x 1.4826 x 1
    assert judged([1.0, 3.0, 1.0, 3.0, 2.0, 8.0]) == [5]


def test_a_detector_goes_on_from_its_state_as_if_never_stopped() -> None:
    generator = random.Random(0)
    losses = [generator.gauss(3, 0.1) + 4 * (generator.random() < 0.05) for _ in range(300)]
    whole, parts = SpikeDetector(CONFIG), SpikeDetector(CONFIG)
    for loss in losses:
        assert whole.judge(loss) == parts.judge(loss)
        state, parts = parts.state(), SpikeDetector(CONFIG)
        parts.restore(state)
    assert len(judged(losses)) > 5


def test_a_run_reads_every_step_of_the_data_but_those_left_out() -> None:
    generator = random.Random(1)
    for _ in range(200):
        taken = []
        for _ in range(generator.randint(0, 4)):
            first = generator.randint(0, 30)
            taken.append(Rewind(0, first, first + generator.randint(1, 5)))
        rewinds = Rewinds(taken)
        left_out = {step for one in taken for step in range(one.first, one.stop)}
        read = [step for step in range(100) if step not in left_out]
        assert [rewinds.data_step(step) for step in range(60)] == read[:60]
        assert {step for step in range(100) if rewinds.skips(step)} == left_out


def test_checkpoints_of_a_course_that_was_left_are_not_accepted(tmp_path: Path) -> None:
    first, second = Rewind(8, 9, 10), Rewind(4, 7, 8)
    write_rewinds(tmp_path, Rewinds([first, second]))
    rewinds = read_rewinds(tmp_path)
    assert rewinds.taken == [first, second]
    assert rewinds.accept(12, 2)
    assert not rewinds.accept(8, 1) and rewinds.accept(4, 1)
    assert not rewinds.accept(8, 0) and rewinds.accept(4, 0)
    assert read_rewinds(tmp_path / "elsewhere").taken == []


@pytest.mark.parametrize(
    "content,complaint",
    [
        (b"", "Expecting value"),
        (b"[{", "Expecting property name"),
        (b"\xff\xfe\xfd", "can't decode byte"),
        (b"{}", "{} must be a list"),
        (b'["step"]', "entry 1, 'step', must have the fields step, first, stop"),
        (b'[{"step": 4, "first": 7, "stop": 8}, {"step": 0, "first": 1}]', "entry 2, "),
        (b'[{"step": 0, "first": 1, "stop": 2, "more": 3}]', "must have the fields step, first, stop"),
        (b'[{"step": 0, "first": "1", "stop": 2}]', "entry 1: first='1' must be a whole number of at least 0"),
        (b'[{"step": 0, "first": 1.0, "stop": 2}]', "entry 1: first=1.0 must be a whole number"),
        (b'[{"step": true, "first": 1, "stop": 2}]', "entry 1: step=True must be a whole number"),
        (b'[{"step": -1, "first": 1, "stop": 2}]', "entry 1: step=-1 must be a whole number of at least 0"),
        (b'[{"step": 0, "first": 2, "stop": 2}]', "entry 1: stop=2 must be more than first=2"),
    ],
)
def test_a_damaged_record_is_one_line_that_says_what_to_do(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "rewinds.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_rewinds(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{path}: damaged: ") and complaint in message and "delete it" in message
    assert "\n" not in message and len(message) < 400


@pytest.mark.parametrize("override", ["window_steps=1", "skip_steps=0", "max_rewinds=0", "deviations=0", "nats=-1"])
def test_values_out_of_range_are_one_line(override: str) -> None:
    with pytest.raises(ConfigError, match=f"spike.{override.split('=')[0]}="):
        load([f"spike.{override}"])


def test_rows_left_out_without_end_take_no_time():
    rewinds = Rewinds([Rewind(0, 3, 2**61), Rewind(0, 5, 9)])
    assert rewinds.data_step(2) == 2 and rewinds.data_step(3) == 2**61
