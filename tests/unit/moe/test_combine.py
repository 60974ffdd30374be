"""Orthogonal combination: beside the paper's equations in fp64, at dependence, with any router, on any ranks."""

import pytest
import torch
from helpers.routing import experts_only, make_context
from reference.papers import orthogonal as paper
from torch import Tensor

from moe_pretrain.config.load import load
from moe_pretrain.moe.build import build_moe_layer
from moe_pretrain.moe.combine import Orthogonal, OrthogonalConfig
from moe_pretrain.moe.layer import MoELayer
from moe_pretrain.moe.row_layout import order_by
from moe_pretrain.moe.types import ExpertShard

HIDDEN, EXPERTS, WIDTH, TOKENS = 16, 6, 10, 7
FORMS = {"parts": "parts", "magnitudes": "magnitude", "unit": "unit", "symmetric": "loewdin_magnitude"}
"""Ours -> the reference's name."""


def combined(form: str, outputs: Tensor, weights: Tensor, experts: list[list[int]] | None = None) -> Tensor:
    """``[tokens, hidden]`` from ``outputs [routes, hidden]`` of tokens with the given experts, else all of them."""
    if experts is None:
        experts = [[0, 1, 2]] * (len(outputs) // 3)
    token = torch.tensor([t for t, own in enumerate(experts) for _ in own], dtype=torch.int64)
    expert = torch.tensor([e for own in experts for e in own], dtype=torch.int64)
    same = len({len(own) for own in experts}) == 1
    counts = torch.bincount(expert, minlength=EXPERTS)
    route_of_row, order = order_by(expert, token, len(experts), len(experts[0]) if same else None, counts)
    return Orthogonal(form)(outputs[route_of_row], weights[route_of_row], order)


def make_layer(form: str, router: str, *overrides: str) -> MoELayer:
    """A layer with float32 weights that are all visible in its output."""
    config = load([f"router={router}", f"model.moe.num_experts={EXPERTS}", *overrides]).router
    moe = experts_only(EXPERTS, WIDTH)
    moe = type(moe)(**{**vars(moe), "combine": OrthogonalConfig("orthogonal", form)})
    layer = build_moe_layer(moe, config, HIDDEN, 0, ExpertShard())
    drawn = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        parameter.data = 0.4 * torch.randn(parameter.shape, generator=drawn)
    return layer


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "router", [["top_k", "router.top_k=3"], ["top_p", "router.threshold=0.7"], ["relu"]], ids=lambda words: words[0]
)
def test_output_and_every_gradient_are_the_reference_s(form: str, router: list[str]):
    """The paper's loops in fp64, with the router's own weights: fixed and variable numbers of experts, none too."""
    layer = make_layer(form, *router)
    hidden = drawn(TOKENS, HIDDEN).requires_grad_()
    output = layer(hidden, make_context(TOKENS), False).hidden
    upstream = drawn(TOKENS, HIDDEN, seed=5)
    ours = torch.autograd.grad((output * upstream).sum(), [hidden, *layer.parameters()])

    routing = layer.router(hidden, make_context(TOKENS))
    counts = torch.bincount(routing.token_index, minlength=TOKENS)
    assert router[0] == "top_k" or counts.unique().numel() > 1
    where = routing.token_index, routing.expert_index
    mask = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool).index_put(where, torch.tensor(True))
    weights = torch.zeros(TOKENS, EXPERTS, dtype=torch.float64).index_put(where, routing.weight.double())
    gate, up = layer.experts.in_weight.double().chunk(2, dim=1)
    theirs = paper.forward(
        hidden.double(), mask, weights, gate, up, layer.experts.out_weight.double(), FORMS[form], "weight"
    )
    torch.testing.assert_close(output.double(), theirs, rtol=1e-5, atol=1e-6)
    expected = torch.autograd.grad((theirs * upstream.double()).sum(), [hidden, *layer.parameters()])
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5 * float(other.abs().max()))


@pytest.mark.parametrize("form", ["parts", "magnitudes", "unit", "symmetric"])
def test_components_are_orthogonal(form: str):
    """What the output gains with one weight: any two of a token's components are at right angles."""
    outputs = drawn(3 * 4, HIDDEN)
    weights = torch.tensor([3.0, 2.0, 1.0]).repeat(4)
    base, components = combined(form, outputs, weights), []
    for one in range(3):
        # Linear in the weights as long as their order stays, so a difference is the component.
        more = weights.clone()
        more[one::3] += 0.5
        components.append(2 * (combined(form, outputs, more) - base))
    for first in range(3):
        for second in range(first):
            cosine = torch.cosine_similarity(components[first], components[second], dim=1)
            assert float(cosine.abs().max()) < 1e-5


def test_the_best_expert_is_untouched():
    outputs, weights = drawn(3 * 4, HIDDEN), torch.tensor([0.2, 0.5, 0.3]).repeat(4)
    only_best = torch.tensor([0.0, 0.5, 0.0]).repeat(4)
    torch.testing.assert_close(combined("parts", outputs, only_best), 0.5 * outputs[1::3])
    for form in ("parts", "magnitudes"):
        best = outputs[1::3] / outputs[1::3].norm(dim=1, keepdim=True)
        along = (combined(form, outputs, weights) * best).sum(dim=1)
        torch.testing.assert_close(along, 0.5 * outputs[1::3].norm(dim=1))


@pytest.mark.parametrize("form", FORMS)
def test_equal_outputs_are_finite_and_the_second_adds_nothing(form: str):
    """Duplicate experts: a direction of rounding noise must neither appear nor take anything from a third output."""
    first, third = drawn(4, HIDDEN), drawn(4, HIDDEN, seed=3)
    outputs = torch.stack([first, first, third], dim=1).flatten(0, 1).requires_grad_()
    weights = torch.tensor([0.5, 0.3, 0.2]).repeat(4).requires_grad_()
    output = combined(form, outputs, weights)
    gradients = torch.autograd.grad((output * drawn(4, HIDDEN, seed=5)).sum(), [outputs, weights])
    assert all(gradient.isfinite().all() for gradient in gradients)
    if form == "parts":
        without = combined(
            form,
            torch.stack([first, third], dim=1).flatten(0, 1),
            torch.tensor([0.5, 0.2]).repeat(4),
            [[0, 1]] * 4,
        )
        torch.testing.assert_close(output, without, rtol=1e-5, atol=1e-6)
        # Continuous at dependence: a second output that almost is the first one's double adds almost nothing.
        near = torch.stack([first, first + 1e-4 * third], dim=1).flatten(0, 1)
        two = combined(form, near, torch.tensor([0.5, 0.3]).repeat(4), [[0, 1]] * 4)
        torch.testing.assert_close(two, 0.5 * first, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_an_output_of_zero_is_finite_and_changes_nothing(form: str):
    outputs = drawn(6, HIDDEN)
    outputs[1::3] = 0.0
    outputs.requires_grad_()
    weights = torch.tensor([0.2, 0.5, 0.3]).repeat(2)
    output = combined(form, outputs, weights)
    assert torch.autograd.grad(output.sum(), outputs)[0].isfinite().all()
    rest = outputs.detach().view(2, 3, HIDDEN)[:, ::2].flatten(0, 1)
    torch.testing.assert_close(output, combined(form, rest, torch.tensor([0.2, 0.3]).repeat(2), [[0, 2]] * 2))


@pytest.mark.parametrize("form", ["parts", "magnitudes", "symmetric"])
def test_orthogonal_outputs_are_summed_as_they_are(form: str):
    """Of equal length too, where the eigenvalues of Loewdin's matrix are all the same."""
    outputs = torch.linalg.qr(drawn(HIDDEN, 3))[0].T.contiguous() * torch.tensor([[2.0], [2.0], [2.0]])
    outputs.requires_grad_()
    weights = torch.tensor([0.2, 0.5, 0.3])
    output = combined(form, outputs, weights)
    torch.testing.assert_close(output, (weights[:, None] * outputs).sum(dim=0, keepdim=True))
    assert torch.autograd.grad(output.square().sum(), outputs)[0].isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_derivatives(form: str):
    """gradcheck in fp64, of tokens with three, two, one and no experts."""
    experts = [[0, 2, 4], [1, 2], [5], []]
    outputs = drawn(6, 5).double().requires_grad_()
    weights = torch.tensor([0.2, 0.5, 0.3, 0.6, 0.4, 1.0], dtype=torch.float64, requires_grad=True)

    def double(outputs: Tensor, weights: Tensor) -> Tensor:
        """The same factors without the float32 of the last sum."""
        rows = []
        start = 0
        for own in experts:
            part = slice(start, start + len(own))
            start = part.stop
            order = weights[part].argsort(descending=True)
            v, g = outputs[part][order], weights[part][order]
            if own:
                rows.append(Orthogonal(form).factors((v @ v.T)[None], g[None])[0] @ v)
        return torch.stack(rows)

    assert torch.autograd.gradcheck(double, (outputs, weights))
    single = combined(form, outputs.detach().float(), weights.detach().float(), experts)
    torch.testing.assert_close(single[:3], double(outputs, weights).float(), rtol=1e-5, atol=1e-6)
    assert not single[3].any()


def test_equal_weights_keep_the_router_s_order_and_other_weights_do_not():
    outputs = drawn(3, HIDDEN)
    tied = combined("parts", outputs, torch.full((3,), 0.5))
    expected = paper.combine(outputs.double(), torch.full((3,), 0.5).double(), "parts", "given").y
    torch.testing.assert_close(tied[0].double(), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(tied, combined("parts", outputs.flip(0), torch.full((3,), 0.5)), atol=1e-3)
    symmetric = combined("symmetric", outputs, torch.full((3,), 0.5))
    torch.testing.assert_close(symmetric, combined("symmetric", outputs.flip(0), torch.full((3,), 0.5)))


def test_bfloat16_outputs_are_compared_exactly():
    """Products of rounded rows in float64: what is returned differs from the rows' own answer by its rounding alone."""
    outputs = drawn(3 * 8, HIDDEN).bfloat16()
    weights = torch.tensor([0.2, 0.5, 0.3]).repeat(8)
    exact = combined("parts", outputs.float(), weights)
    torch.testing.assert_close(combined("parts", outputs, weights), exact.bfloat16(), rtol=0, atol=0)
