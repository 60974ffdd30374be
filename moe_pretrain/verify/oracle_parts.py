"""The oracle's statistics of attention: from explicit softmax matrices, one token at a time."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from moe_pretrain.model.attention import QKNorm
from moe_pretrain.moe.combine import CombineConfig, OrthogonalConfig, OrthogonalForm
from moe_pretrain.moe.experts.factorised import FactorisedExperts
from moe_pretrain.moe.experts.latent import LatentMaps
from moe_pretrain.moe.experts.matrix_product import MatrixProductExperts
from moe_pretrain.moe.experts.merged import MergedExperts
from moe_pretrain.moe.experts.swiglu import SwiGLU, SwiGLUExperts
from moe_pretrain.moe.experts.unequal import UnequalExperts
from moe_pretrain.moe.experts.zero_computation import ConstantExpert
from moe_pretrain.moe.layer import MoEConfig, MoELayer
from moe_pretrain.moe.types import AttentionStatistic


@torch.no_grad()
def statistic_of_matrices(name: AttentionStatistic, matrices: list[Tensor], documents: Tensor) -> Tensor:
    """The statistic ``name`` of every token of one row.

    Args:
        name: ``model/attention_statistic.py`` says what each is; no code is shared with it.
        matrices: Each head's attention weights ``[sequence, sequence]``, query by key.
        documents: Document of each token ``[sequence]``.

    Returns:
        ``[sequence]``.
    """
    heads = [matrix.tolist() for matrix in matrices]
    owner = documents.tolist()
    values = []
    for token in range(len(owner)):
        document = [other for other in range(len(owner)) if owner[other] == owner[token]]
        seen = [key for key in document if key <= token]
        if name == "received":
            later = [query for query in document if query >= token]
            per_head = [sum(head[query][token] for query in later) / len(later) for head in heads]
        else:
            per_head = [_of_row(name, [head[token][key] for key in seen]) for head in heads]
        value = sum(per_head) / len(per_head)
        if name.startswith("corrected"):
            uniform = 1 / len(seen)
            value = max(0.0, (value - uniform) / (1 - uniform)) if uniform < 1 else 0.0
        values.append(value)
    return torch.tensor(values)


def _of_row(name: AttentionStatistic, weights: list[float]) -> float:
    """One head's statistic of one query; ``weights`` are those of the keys that it sees, the first to itself."""
    if name == "row_max":
        return max(weights)
    if name == "corrected_row_max":
        return max(weights[1:], default=0.0)
    if name == "corrected_row_max_without_self":
        return max(weights[1:-1], default=0.0)
    assert name == "entropy"
    if len(weights) == 1:
        return 1.0
    return 1 + sum(weight * math.log(weight) for weight in weights if weight > 0) / math.log(len(weights))


def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root-mean-square norm over the last axis, by its formula."""
    return hidden / (hidden.square().mean(dim=-1, keepdim=True) + epsilon).sqrt() * weight


def norm_heads(kind: QKNorm, projected: Tensor, weight: Tensor | None, size: int, epsilon: float) -> Tensor:
    """Queries or keys ``[tokens, heads * size]`` of one row after ``model.qk_norm``, whose weight is ``weight``."""
    if weight is None:
        return projected
    if kind == "whole":
        return rms_norm(projected, weight, epsilon)
    return torch.cat([rms_norm(head, weight, epsilon) for head in projected.split(size, dim=1)], dim=1)


def run_expert(layer: MoELayer, expert: int, hidden: Tensor, moe: MoEConfig) -> Tensor:
    """One expert's output; a factorised gate is computed from the input, never sent along."""
    experts, kinds = layer.experts, layer.kinds
    hidden = hidden * layer.input_scale
    if expert >= kinds.ffn + kinds.constant:
        return hidden if expert < kinds.ffn + kinds.constant + kinds.copy else torch.zeros_like(hidden)
    if expert >= kinds.ffn:
        assert layer.zero_computation is not None
        constant = layer.zero_computation.constants[expert - kinds.ffn]
        assert isinstance(constant, ConstantExpert)
        powers = (hidden @ constant.mix_weight.T).exp()
        of_input, of_value = (powers / powers.sum(dim=1, keepdim=True)).split(1, dim=1)
        return of_input * hidden + of_value * constant.value
    if isinstance(experts, FactorisedExperts):
        owner = layer.router if experts.down_weight is None else experts
        down_weight = owner.down_weight
        assert isinstance(down_weight, Tensor)
        gate = hidden @ down_weight[expert].T @ experts.up_weight[expert].T
        value = hidden @ experts.in_weight[expert].T
        return _gated(gate, value, moe) @ experts.out_weight[expert].T
    if isinstance(experts, UnequalExperts):
        stack, index = experts.locate(expert)
        return swiglu(hidden, stack.in_weight[index], stack.out_weight[index], moe)
    if isinstance(experts, MatrixProductExperts):
        gate, up, out = (_rebuilt(experts, name, expert) for name in ("gate", "up", "out"))
        return swiglu(hidden, torch.cat([gate, up]), out, moe)
    return swiglu(hidden, experts.in_weight[expert], experts.out_weight[expert], moe)


def _rebuilt(experts: MatrixProductExperts, name: str, expert: int) -> Tensor:
    """One matrix of one expert: the outer products of its cores, summed bond by bond."""
    cores = [core if index == experts.centre else core[expert] for index, core in enumerate(experts.cores(name))]
    matrix = torch.ones(1, 1, 1)  # [rows, columns, bond]
    for core in cores:
        rows, columns, _ = matrix.shape
        product = torch.tensordot(matrix, core, dims=1).transpose(1, 2)
        matrix = product.reshape(rows * core.shape[1], columns * core.shape[2], core.shape[3])
    return matrix[:, :, 0]


def run_merged(experts: MergedExperts, hidden: Tensor, weight: Tensor, moe: MoEConfig) -> Tensor:
    """Every token through the network whose parameters are the experts' sums with the token's own weights."""
    gates, ups, outs = experts.in_weight[:, 0], experts.in_weight[:, 1], experts.out_weight
    outputs = []
    # Neighbours of equal weights are not taken together: one may have them without gradient.
    for row, shares in zip(hidden, weight, strict=True):
        gate, up, out = (torch.tensordot(shares, stacked, dims=([0], [1])) for stacked in (gates, ups, outs))
        outputs.append(swiglu(row, torch.cat([gate, up]), out.T, moe))
    return torch.stack(outputs)


def combine_outputs(config: CombineConfig, outputs: Tensor, weights: Tensor, routed: Tensor) -> Tensor:
    """Each token's output from those of its experts, one expert or one token at a time.

    Args:
        config: How.
        outputs: Every expert's output of every token ``[experts, tokens, hidden]``, whatever where it was not asked.
        weights: Route weights ``[tokens, experts]``.
        routed: The routes, likewise.
    """
    if not isinstance(config, OrthogonalConfig):
        total = torch.zeros_like(outputs[0])
        for output, weight, chosen in zip(outputs, weights.T, routed.T, strict=True):
            total = total + output * torch.where(chosen, weight, 0.0)[:, None]
        return total
    combined = []
    for token in range(outputs.shape[1]):
        experts = routed[token].nonzero()[:, 0].tolist()
        experts.sort(key=lambda expert: -weights[token, expert].item())  # stable: of equal weights the lower expert
        own = _orthogonal(config.form, [outputs[expert, token] for expert in experts])
        factors = [weights[token, expert] for expert in experts]
        total = torch.zeros_like(outputs[0, token])
        for factor, output in zip(factors, own, strict=True):
            total = total + factor * output
        combined.append(total)
    return torch.stack(combined)


def _orthogonal(form: OrthogonalForm, outputs: list[Tensor]) -> list[Tensor]:
    """Gram-Schmidt, one output after the other; Loewdin by the inverse square root, iterated."""
    if form == "symmetric":
        return _loewdin(outputs)
    parts: list[Tensor] = []
    for output in outputs:
        part = output.double()
        for earlier in parts:
            part = part - (earlier * part).sum() / (earlier * earlier).sum() * earlier
        parts.append(part)
    if form == "parts":
        return [part.float() for part in parts]
    sizes = [output.double().norm() if form == "magnitudes" else 1.0 for output in outputs]
    return [(size * part / part.norm()).float() for size, part in zip(sizes, parts, strict=True)]


def _loewdin(outputs: list[Tensor]) -> list[Tensor]:
    """Rows of ``(V V^T)^(-1/2) V``, each as long as the output was; the root by the coupled Newton-Schulz iteration."""
    if not outputs:
        return []
    stacked = torch.stack(outputs).double()
    products, identity = stacked @ stacked.T, torch.eye(len(outputs), dtype=torch.float64)
    scale = products.detach().norm()
    root, inverse = products / scale, identity
    for _ in range(60):
        step = (3 * identity - inverse @ root) / 2
        root, inverse = root @ step, step @ inverse
    sizes = stacked.norm(dim=1, keepdim=True)
    return list((sizes * (inverse / scale.sqrt() @ stacked)).float().unbind())


def narrow(latent: LatentMaps | None, hidden: Tensor) -> Tensor:
    """Rows that experts of another width than the model's read."""
    return hidden if latent is None else hidden @ latent.in_weight.T


def widen(latent: LatentMaps | None, combined: Tensor) -> Tensor:
    """The layer's output of what they return, normalised first where that is asked for."""
    if latent is None:
        return combined
    if latent.norm_weight is not None:
        assert latent.norm_epsilon is not None
        combined = rms_norm(combined, latent.norm_weight, latent.norm_epsilon)
    return combined @ latent.out_weight.T


def score(
    layer: MoELayer, moe: MoEConfig, hidden: Tensor, candidates: Tensor, query: Tensor, key_weight: Tensor
) -> Tensor:
    """Every candidate's key, made from its activation, times the token's query."""
    assert isinstance(layer.experts, SwiGLUExperts)
    scores = torch.zeros(candidates.shape)
    for expert in range(layer.kinds.ffn):
        routes = tokens, _ = (candidates == expert).nonzero(as_tuple=True)
        keys = _inner(hidden[tokens], layer.experts.in_weight[expert], moe) @ key_weight.T
        scores = scores.index_put(routes, (keys * query[tokens]).sum(dim=1))
    return scores


def coupling_loss(rows: Tensor, alpha: float, proxy_norms: Callable[[Tensor], Tensor], noise: Tensor) -> Tensor:
    """Loss that couples experts and rows of the router (arXiv:2512.23447), pair by pair; ``noise`` in [-1, 1)."""
    proxies = []
    for index, row in enumerate(rows):
        distances = [float((row - other).detach().norm()) for place, other in enumerate(rows) if place != index]
        proxies.append(row * (1 + min(distances) / (2 * float(row.detach().norm())) * noise[index]))
    norms, number = proxy_norms(torch.stack(proxies)), len(rows)
    total = torch.zeros(())
    for one in range(number):
        for other in range(number):
            if one != other:
                own = alpha * norms[one, one]
                total = total + torch.relu(norms[one, other] - own) + torch.relu(norms[other, one] - own)
    return total / number**2


def proxy_norms(layer: MoELayer, proxies: Tensor) -> Tensor:
    """Length of each expert's pre-activation of the gate (columns) for each row."""
    assert isinstance(layer.experts, SwiGLUExperts)
    width = layer.experts.in_weight.shape[1] // 2
    lengths = []
    for proxy in proxies:
        inputs = narrow(layer.latent, proxy[None])[0]
        lengths.append(torch.stack([(matrix[:width] @ inputs).norm() for matrix in layer.experts.in_weight]))
    return torch.stack(lengths)


def run_shared(shared: SwiGLU, hidden: Tensor, moe: MoEConfig) -> Tensor:
    """The shared experts, times their gate where they have one."""
    output = swiglu(hidden, shared.in_weight, shared.out_weight, moe)
    if shared.gate_weight is None:
        return output
    return output / (1 + (-(hidden @ shared.gate_weight[0])).exp())[:, None]


def swiglu(hidden: Tensor, in_weight: Tensor, out_weight: Tensor, moe: MoEConfig | None = None) -> Tensor:
    """A network whose gate and up are stacked in ``in_weight [2 * width, hidden]``, activated as ``moe`` says."""
    return _inner(hidden, in_weight, moe) @ out_weight.T


def _inner(hidden: Tensor, in_weight: Tensor, moe: MoEConfig | None) -> Tensor:
    width = in_weight.shape[0] // 2
    return _gated(hidden @ in_weight[:width].T, hidden @ in_weight[width:].T, moe)


def _gated(gate: Tensor, up: Tensor, moe: MoEConfig | None) -> Tensor:
    if moe is not None and (bound := moe.activation_limit) is not None:
        gate = torch.where(gate > bound, bound, gate)
        up = torch.where(up > bound, bound, torch.where(up < -bound, -bound, up))
    if moe is not None and moe.activation == "gpt_oss":
        return (up + 1) * gate / (1 + (-1.702 * gate).exp())
    return gate * torch.sigmoid(gate) * up


def rotate(heads: Tensor, positions: Tensor, base: float) -> Tensor:
    """Turn the pair (i, i + half) of each row by ``position * base ** (-i / half)``."""
    half = heads.shape[1] // 2
    turned = []
    for pair in range(half):
        angle = positions.float() * base ** (-pair / half)
        cosine, sine = angle.cos(), angle.sin()
        first, second = heads[:, pair], heads[:, pair + half]
        turned.append((first * cosine - second * sine, second * cosine + first * sine))
    return torch.stack([*(first for first, _ in turned), *(second for _, second in turned)], dim=-1)
