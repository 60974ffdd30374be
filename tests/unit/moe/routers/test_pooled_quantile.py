"""The pooled histogram against a sort: where a quota of an expert's values ends, however the tokens were cut."""

import pytest
import torch
from torch import Tensor

from moe_pretrain.moe.routers.pooled_quantile import count_in_bins, value_at

EXPERTS, TOKENS = 3, 400
ALL = torch.ones(TOKENS, dtype=torch.bool)


def draw(kind: str) -> Tensor:
    """Values in [-1, 1], another distribution for every expert."""
    spread = torch.tensor([0.1, 0.3, 1.0])
    values = torch.rand(TOKENS, EXPERTS) * 2 - 1
    if kind == "normal":
        values = (torch.randn(TOKENS, EXPERTS) * spread + torch.tensor([0.5, 0.0, -0.3])).clamp(-1, 1)
    if kind == "atoms":  # many equal values, as where an expert itself is the cutoff
        values = torch.where(torch.rand(TOKENS, EXPERTS) < 0.5, torch.tensor([0.123, -0.7, 0.0]), values)
    return values


def next_above(values: Tensor, quota: float) -> list[float]:
    """The ``quota + 1``-th smallest of each expert, by sorting."""
    return [sorted(column)[int(quota)] for column in values.t().tolist()]


def test_counts_equal_a_loop() -> None:
    values, text = draw("normal"), torch.rand(TOKENS) < 0.7
    counts = count_in_bins(values, -1.0, 1.0, 7, text)
    expected = [[0] * 7 for _ in range(EXPERTS)]
    for row, is_text in zip(values.tolist(), text.tolist(), strict=True):
        for expert, value in enumerate(row):
            if is_text:
                expected[expert][min(6, int((value + 1) * 7 / 2))] += 1
    assert counts.tolist() == expected and counts.dtype == torch.float64
    assert counts.sum(dim=1).tolist() == [int(text.sum())] * EXPERTS  # clamped to 1 or -1: not lost


@pytest.mark.parametrize("bins", [2, 10, 1000, 100_000])
@pytest.mark.parametrize("kind", ["uniform", "normal", "atoms"])
def test_within_one_bin_of_the_sort(kind: str, bins: int) -> None:
    values, width = draw(kind), 2 / bins
    counts = count_in_bins(values, -1.0, 1.0, bins, ALL)
    for quota in (0.0, 1.0, 7.5, 100.0, 200.0, 399.0):
        found = value_at(counts, -1.0, 1.0, torch.full((EXPERTS,), quota, dtype=torch.float64))
        for ours, exact in zip(found.tolist(), next_above(values, quota), strict=True):
            assert abs(ours - exact) <= width * (1 + 1e-3) + 1e-6, (quota, ours, exact)


def test_a_quota_that_ends_between_bins_is_met_exactly() -> None:
    """With a value per bin at most, exactly ``quota`` values are below, whatever the quota."""
    values = torch.stack([torch.randperm(1000)[:TOKENS] for _ in range(EXPERTS)], dim=1) / 500 - 0.999
    counts = count_in_bins(values, -1.0, 1.0, 1000, ALL)
    assert counts.max() == 1
    quota = torch.tensor([0.0, 123.0, 399.0], dtype=torch.float64)
    assert (values < value_at(counts, -1.0, 1.0, quota)).sum(dim=0).tolist() == quota.tolist()


def test_interpolates_inside_a_bin() -> None:
    counts = torch.tensor([[0.0, 4.0, 0.0, 2.0]], dtype=torch.float64)
    ends = [
        value_at(counts, 0.0, 8.0, torch.tensor([quota], dtype=torch.float64)).item() for quota in (0, 1, 3, 4, 5, 6)
    ]
    assert ends == [2.0, 2.5, 3.5, 6.0, 7.0, 8.0]


def test_parts_add_to_the_whole_bit_for_bit() -> None:
    values, text = draw("normal"), torch.rand(TOKENS) < 0.7
    whole = count_in_bins(values, -1.0, 1.0, 50, text)
    for cuts in ([400], [1, 399], [100, 100, 100, 100], [7, 0, 250, 143]):
        pairs = zip(values.split(cuts), text.split(cuts), strict=True)
        assert torch.equal(sum(count_in_bins(part, -1.0, 1.0, 50, own) for part, own in pairs), whole)


def test_quantiles_of_parts_do_not_average_to_that_of_the_whole() -> None:
    """Three parts low, one high: a quarter of all is above 0, but the mean of the parts' medians is far below."""
    values = torch.cat([torch.full((300, EXPERTS), -0.9), torch.full((100, EXPERTS), 0.9)])
    values += torch.rand_like(values) * 0.05
    parts = [count_in_bins(part, -1.0, 1.0, 1000, ALL[:100]) for part in values.split(100)]

    def cut(counts: Tensor) -> Tensor:
        return value_at(counts, -1.0, 1.0, counts.sum(dim=1) * 0.75)

    pooled, averaged = cut(sum(parts)), torch.stack([cut(part) for part in parts]).mean(dim=0)
    assert (values < pooled).sum(dim=0).tolist() == [300] * EXPERTS
    assert ((values > -0.5) & (values < averaged)).sum() == 0 and (averaged < -0.3).all() and (pooled > 0.89).all()
