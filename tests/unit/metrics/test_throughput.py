"""Throughput: the peak table, utilisation by hand, and a stopwatch that leaves pauses out."""

import pytest

from moe_pretrain.metrics.throughput import Stopwatch, model_flops_utilization, peak_flops_per_second


@pytest.mark.parametrize(
    ("device_name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A800-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A10", None),
        ("NVIDIA L40", None),
        ("NVIDIA GB200", None),
        ("cpu", None),
    ],
)
def test_peak_is_known_or_left_out(device_name, peak):
    assert peak_flops_per_second(device_name) == peak


def test_utilization_by_hand():
    # 6e9 FLOPs a token at 100,000 tokens a second is 6e14 FLOP/s, on two devices of 1e15 each.
    assert model_flops_utilization(6e9, 100_000, 2, 1e15) == pytest.approx(0.3)


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_stopwatch_leaves_pauses_out_and_starts_again():
    clock = Clock()
    stopwatch = Stopwatch(clock)
    for _ in range(4):
        clock.now += 0.5
        stopwatch.count(1000)
    with stopwatch.paused():
        clock.now += 60
    window = stopwatch.read()
    assert window.tokens_per_second == pytest.approx(2000)
    assert window.step_seconds == pytest.approx(0.5)
    clock.now += 2
    stopwatch.count(1000)
    assert stopwatch.read().tokens_per_second == pytest.approx(500)


def test_stopwatch_counts_a_pause_that_failed():
    clock = Clock()
    stopwatch = Stopwatch(clock)
    with pytest.raises(OSError), stopwatch.paused():
        clock.now += 60
        raise OSError
    clock.now += 1
    stopwatch.count(10)
    assert stopwatch.read().tokens_per_second == pytest.approx(10)


def test_reading_without_a_step_is_refused():
    with pytest.raises(ValueError, match="no step was counted"):
        Stopwatch().read()


def test_waiting_for_data_is_a_share_of_the_time_that_is_not_paused():
    clock = Clock()
    stopwatch = Stopwatch(clock)

    def slow_items():
        for item in range(3):
            clock.now += 0.1
            yield item

    seen = []
    for item in stopwatch.waits(slow_items()):
        seen.append(item)
        clock.now += 0.4
        stopwatch.count(10)
        with stopwatch.paused():
            clock.now += 60
    assert seen == [0, 1, 2]
    assert stopwatch.read().data_wait_share == pytest.approx(0.2)
    clock.now += 1
    stopwatch.count(10)
    assert stopwatch.read().data_wait_share == 0
