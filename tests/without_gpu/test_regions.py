"""Regions that are one kernel on a GPU, compiled for the CPU, against the operations that they are made of."""

import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe_pretrain.model import cross_entropy, norms, rotary
from moe_pretrain.moe import dispatch, losses, row_layout
from moe_pretrain.moe.compiled import compiled
from moe_pretrain.moe.experts import activation
from moe_pretrain.moe.routers import base, top_k

ROWS, SOURCES, HIDDEN, EXPERTS, VOCAB = 37, 19, 24, 5, 96


def rows(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape).to(dtype)


def probs() -> Tensor:
    return torch.randn(ROWS, EXPERTS).softmax(dim=-1).requires_grad_()


MASK = torch.arange(ROWS) % 4 > 0
LABELS = torch.where(MASK, torch.arange(ROWS) * 2, cross_entropy.IGNORE_INDEX)
SLOTS = torch.tensor([[row, -1 if row % 3 else (row + 18) % ROWS] for row in range(SOURCES)])
CHOSEN = torch.stack([torch.arange(ROWS) % EXPERTS, (torch.arange(ROWS) * 3 + 1) % EXPERTS], dim=1)
ROUTES = torch.arange(ROWS).repeat_interleave(2)
COSTS = torch.linspace(0.5, 1.5, EXPERTS)
HEADS, KEYS, ANGLES = (2, 6, 8, 16), (2, 3, 8, 16), torch.rand(2, 1, 8, 8)
REGIONS: dict[str, tuple[Callable[..., object], Callable[[], tuple[object, ...]]]] = {
    "activation": (activation._swiglu, lambda: (rows(ROWS, 2 * HIDDEN),)),
    "its gradients": (activation._swiglu_gradients, lambda: (rows(ROWS, 2 * HIDDEN), rows(ROWS, HIDDEN))),
    "its gradients, weighted": (
        activation._swiglu_gradients,
        lambda: (rows(ROWS, 2 * HIDDEN), rows(ROWS, HIDDEN), torch.rand(ROWS, 1)),
    ),
    "rotary": (rotary._rotate_at_once, lambda: (rows(*HEADS), ANGLES.cos(), ANGLES.sin(), False)),
    "rotary, back": (rotary._rotate_at_once, lambda: (rows(*HEADS), ANGLES.cos(), ANGLES.sin(), True)),
    "gradient of a projection": (
        rotary._joined_gradient,
        lambda: (rows(*HEADS), rows(*KEYS), rows(*KEYS), ANGLES.cos(), ANGLES.sin()),
    ),
    "norm of a sum": (norms._normed_sum, lambda: (rows(ROWS, HIDDEN), rows(ROWS, HIDDEN), rows(HIDDEN), 1e-5)),
    "norm": (norms._normed_sum, lambda: (rows(ROWS, HIDDEN), None, rows(HIDDEN), 1e-5)),
    "gradients of a norm and its sum": (
        norms._normed_sum_gradients,
        lambda: (*(rows(ROWS, HIDDEN) for _ in range(3)), torch.rand(ROWS, 1), rows(HIDDEN)),
    ),
    "gradients of a norm": (
        norms._normed_sum_gradients,
        lambda: (rows(ROWS, HIDDEN), None, rows(ROWS, HIDDEN), torch.rand(ROWS, 1), rows(HIDDEN)),
    ),
    "labels": (cross_entropy._all_in_vocabulary, lambda: (LABELS, VOCAB)),
    "sums of the loss": (cross_entropy._cross_entropy_sums, lambda: (rows(ROWS, VOCAB), LABELS)),
    "gradient of the loss": (
        cross_entropy._cross_entropy_gradient,
        lambda: (rows(ROWS, VOCAB), LABELS, 3 + torch.rand(ROWS, 1), 90 + torch.rand(ROWS, 1)),
    ),
    "weighted sum": (row_layout._sum_slots, lambda: (rows(ROWS, HIDDEN), SLOTS, torch.rand(ROWS), False)),
    "full sum": (row_layout._sum_slots, lambda: (rows(ROWS, HIDDEN), SLOTS.abs(), None, True)),
    "scaled rows": (row_layout.scaled_rows, lambda: (rows(SOURCES, HIDDEN), SLOTS[:, 0], torch.rand(SOURCES, 1))),
    "shares": (losses._mean_of_shares, lambda: (torch.rand(1, EXPERTS).double(), probs(), MASK)),
    "balance": (losses._balance, lambda: (probs(), torch.rand(1, EXPERTS).double(), MASK, None)),
    "balance of costs": (
        losses._balance,
        lambda: (probs(), torch.ones(1, EXPERTS).double(), MASK, torch.rand(EXPERTS)),
    ),
    "weights": (top_k._route_weights, lambda: (probs(), CHOSEN, True, 2.5)),
    "raw weights": (top_k._route_weights, lambda: (probs(), CHOSEN, False, 1.0)),
    "routes": (top_k._flat_routes, lambda: (torch.stack([CHOSEN, CHOSEN])[:, :, 0].T,)),
    "routes of text": (losses.count_text_routes, lambda: (ROUTES, CHOSEN.flatten(), MASK, 1, EXPERTS)),
    "all routes": (dispatch._count_of_each, lambda: (CHOSEN.flatten(), EXPERTS)),
    "order": (row_layout._inverse, lambda: (CHOSEN.flatten().argsort(stable=True), ROUTES)),
    "z loss": (losses.router_z_loss, lambda: (torch.randn(ROWS, EXPERTS, requires_grad=True), MASK)),
    "entropy": (losses.entropy_loss, lambda: (probs(), MASK)),
    "statistics": (base._count_text, lambda: (probs().detach(), MASK)),
}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler for the CPU needs g++")
@pytest.mark.parametrize("name", REGIONS)
def test_a_compiled_region_is_its_operations_within_rounding(name: str):
    """Values and, where there are any, gradients: a bfloat16 may round to its neighbour, a float32 sum in any order."""
    region, arguments = REGIONS[name]
    given = arguments()
    leaves = [value for value in given if isinstance(value, Tensor) and value.requires_grad]
    found, expected = (_values(function(*given), leaves) for function in (compiled(region), region))
    assert len(found) == len(expected) > 0
    for value, reference in zip(found, expected, strict=True):
        # The plain gradients round products to bfloat16 before they add them, the compiled ones do not.
        is_rounded = value.dtype == torch.bfloat16 or name.startswith("its gradients")
        error, size = (value.double() - reference.double()).norm(), reference.double().norm()
        assert error <= (2**-7 if is_rounded else 1e-6) * size


def _values(output: object, leaves: list[Tensor]) -> list[Tensor]:
    outputs = [output] if isinstance(output, Tensor) else [part for part in output if part is not None]
    return outputs + (list(torch.autograd.grad(outputs[0].square().sum(), leaves)) if leaves else [])
