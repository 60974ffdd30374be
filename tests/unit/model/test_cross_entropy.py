"""The chunked loss: its sums, and labels for which there is no logit."""

import pytest
import torch
from torch.nn import functional

from moe_pretrain.model.cross_entropy import IGNORE_INDEX, chunked_cross_entropy, two_pass_losses


def test_the_heads_gradient_is_summed_over_chunks_in_float32():
    """512 chunks with one target: in bfloat16 the sum stands still once it is 256 times a chunk's part."""
    tokens, vocab, width = 4096, 4, 8
    hidden = (torch.rand(tokens, width) + 0.5).bfloat16()
    weight = torch.zeros(vocab, width, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(tokens, dtype=torch.long)
    chunked_cross_entropy(hidden, weight, labels, 8).backward()
    exact = torch.zeros(vocab, width, requires_grad=True)
    functional.cross_entropy(hidden.float() @ exact.t(), labels, reduction="sum").backward()
    torch.testing.assert_close(weight.grad.float(), exact.grad, rtol=5e-3, atol=0)


@pytest.mark.parametrize("wrong", [7, -1, -99])
def test_labels_without_a_logit_are_refused(wrong: int):
    """One too many, and negative ones that are not the one that means "not counted"."""
    hidden, weight, labels = torch.randn(5, 4), torch.randn(7, 4), torch.tensor([0, 6, IGNORE_INDEX, 3, 2])
    text = torch.ones(5, dtype=torch.bool)
    assert chunked_cross_entropy(hidden, weight, labels, 2).isfinite()
    assert two_pass_losses(hidden, hidden, weight, labels, text, 8)[0].isfinite()
    labels[3] = wrong
    refused = "labels must be ids below the vocabulary's size, 7, or IGNORE_INDEX=-100"
    with pytest.raises(RuntimeError, match=refused):
        chunked_cross_entropy(hidden, weight, labels, 2)
    with pytest.raises(RuntimeError, match=refused):
        two_pass_losses(hidden, hidden, weight, labels, text, 8)
