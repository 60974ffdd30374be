"""Merged experts whose width is spread over ranks: every rank's tokens and segments reach all of them."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from helpers.cuda_branches import Waits
from helpers.processes import run_on_ranks
from helpers.routing import make_context
from torch import Tensor

from moe_pretrain.config.load import load
from moe_pretrain.moe.build import build_moe_layer
from moe_pretrain.moe.merged_layer import MergedLayer
from moe_pretrain.moe.types import ExpertShard
from moe_pretrain.parallel.exchange import AllToAll

HIDDEN, ROW = 8, 10
DOCUMENTS = [[[0] * 10, [0] * 3 + [1] * 7], [[0, 0, 0, 0, 1, 2, 2, -1, -1, -1], [0] * 10, [0] * 9 + [1]]]
"""Of the rows of two ranks."""


def layer_of(rank: int, ranks: int) -> MergedLayer:
    words = ["router=lory", "router.segment_tokens=3", "model.moe.num_experts=3", "model.moe.expert_hidden_size=6"]
    config = load([*words, "model.moe.num_shared_experts=0"])
    layer = build_moe_layer(config.model.moe, config.router, HIDDEN, 0, ExpertShard(rank, ranks))
    assert isinstance(layer, MergedLayer)
    drawn = torch.Generator().manual_seed(1)
    for parameter in layer.router.parameters():
        parameter.data = torch.randn(parameter.shape, generator=drawn)
    for name, shape in (("in_weight", (6, 2, 3, HIDDEN)), ("out_weight", (6, 3, HIDDEN))):
        whole = torch.randn(shape, generator=drawn)
        getattr(layer.experts, name).data = whole[layer.experts.units.start : layer.experts.units.stop]
    return layer


def both(training: bool, rows: int) -> tuple[list[tuple[Tensor, Tensor]], dict[str, int]]:
    """Outputs and gradients of the first ``rows`` rows of this rank, alone and spread; and what was waited for."""
    rank = dist.get_rank()
    ids = torch.tensor(DOCUMENTS[rank][:rows])
    lengths = [int(own) for row in ids for own in torch.unique_consecutive(row, return_counts=True)[1]]
    base = make_context(ids.numel(), len(ids))
    context = replace(
        base, document_ids=ids.flatten(), token_mask=ids.flatten() >= 0, document_lengths=lengths if training else None
    )
    found: list[tuple[Tensor, Tensor]] = []
    for layer in (layer_of(0, 1), layer_of(rank, 2)):
        layer.train(training)
        if layer.experts.units != range(6):
            layer.exchange = AllToAll(dist.group.WORLD)
        hidden = torch.randn(ids.numel(), HIDDEN, generator=torch.Generator().manual_seed(rank)).requires_grad_()
        with Waits() as waits:
            output = layer(hidden, context, False).hidden
        (grad,) = torch.autograd.grad(output.square().sum(), hidden)
        found.append((output.detach(), grad))
    # Not of a GPU: the CPU's branch cuts rows of each segment apart.
    counted = {" ".join(key): number for key, number in waits.found.items() if "grouped.py" not in key[1]}
    return found, counted


@pytest.mark.parametrize(("training", "rows"), [(True, 2), (False, 3)], ids=["training", "uneven evaluation"])
def test_spread_over_two_ranks_it_is_the_layer_alone(training: bool, rows: int):
    """With other documents and so other segments on each; in evaluation with another number of rows too."""
    for found, waits in run_on_ranks(both, 2, training, rows):
        (alone, alone_grad), (spread, spread_grad) = found
        torch.testing.assert_close(spread, alone, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(spread_grad, alone_grad, rtol=1e-4, atol=1e-4)
        assert spread.any() and waits["cpu moe/merged_layer.py _gather"] == 1
        if training:
            assert waits == {"cpu moe/merged_layer.py _gather": 1}
