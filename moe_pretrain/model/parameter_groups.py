"""Groups of parameters: the part of the model that each belongs to, what it reads, and the scale of its learning rate.

``model.init=mup`` is the maximal update parameterisation for AdamW: a learning rate found on a small model holds on a
large one. Let ``m = hidden_size / mup_base_width``, and let a matrix's fan-in be the width of what it multiplies.

======================================  ============================  ================================================
parameter                               learning rate                 standard deviation at the start
======================================  ============================  ================================================
embedding, head                         1                             constant
final norm                              1 / m                         (starts at 1 / m instead of 1)
other norms                             1                             (start at 1)
matrices that read the residual         1 / m                         ``~ 1 / sqrt(hidden_size)``
stream: attention, experts, FFN
matrices that write into it             base fan-in / fan-in          ``~ 1 / sqrt(fan-in)``, and
(``out_weight``)                        ``* base layers / layers``    ``* base layers / layers``
router, and every map from the          1 / m                         ``~ 1 / hidden_size``
residual stream to a few numbers
factorised gate: ``W_down``, ``W_up``   1 / m, base rank / rank       ``~ 1 / sqrt(hidden_size)``, ``~ 1 / sqrt(rank)``
======================================  ============================  ================================================

The base of an inner width (of an expert, of a dense FFN) is ``2 * mup_base_width`` and that of a gate's rank
``mup_base_width / 4``, the shapes of ``model=tiny``; there every factor is 1 and the start is that of
``init=width_aware``. Number of experts and ``top_k`` do not enter: with weights that sum to 1 the output of a layer is
a mean of experts, and AdamW's update of an expert does not depend on how much gradient reaches it. The width of an
expert does, as its fan-in, and the shared experts count as one network of their summed width.

No factor is applied in the forward pass. Under AdamW a factor ``c`` in front of a weight is the same as a start and a
rate ``c`` times as large, so the 1 / m of the logits stands in the final norm, which serves a tied embedding too, and
what a block adds is scaled in its ``out_weight``. So the model, its export and the oracle know nothing of it. What does
differ is the gradient's global norm, to which the final norm contributes ``m`` times as much.

A router's matrix is an output matrix (width to a few numbers), so its logits start ``1 / sqrt(m)`` as large; with the
spread of a hidden matrix its gradient into the residual stream would outgrow the language model's by ``sqrt(m)``.
Attention keeps ``1 / sqrt(head_size)``: widths differ in the number of heads.

Under Muon a hidden matrix has an update of orthogonal directions, whose singular values are all
``0.2 sqrt(max(rows, columns))`` times the rate: elements of the same size as AdamW's, but a spectral norm that grows
with the root of the width where that of AdamW's, which points in few directions, grows with the width. So its 1 / m is
``1 / sqrt(m)``; depth stays as it is, since both updates do not depend on the gradient's size.

Weight decay does not follow these scales: a matrix shrinks by ``learning_rate(step) * weight_decay`` per step whatever
its own rate. AdamW's epsilon is not scaled: gradients of hidden matrices fall as 1 / m, so it must stay far below them.

Source:
    Yang et al. 2022 (arXiv:2203.03466), tables 3 and 8, for widths; Dey et al. 2025 (arXiv:2505.01618) for depth with
    alpha = 1; Wang and Aitchison 2024 (arXiv:2405.13698) for weight decay. That this carries over to experts and
    routers is the subject of arXiv:2508.09752, 2601.20205 and 2605.23893, whose setups differ from this one in details;
    what was measured here stands in the README of this folder.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from moe_pretrain.model.attention import Attention
from moe_pretrain.model.decoder import DecoderLM, ModelConfig
from moe_pretrain.model.norms import ResidualNorm, RMSNorm
from moe_pretrain.moe.experts.factorised import FactorisedExperts
from moe_pretrain.moe.experts.latent import LatentMaps
from moe_pretrain.moe.experts.matrix_product import MatrixProductExperts, core_matrix
from moe_pretrain.moe.experts.merged import MergedExperts
from moe_pretrain.moe.experts.swiglu import SwiGLU, SwiGLUExperts
from moe_pretrain.moe.experts.zero_computation import ConstantExpert
from moe_pretrain.moe.router import Router
from moe_pretrain.moe.routers.attentive import QueryKey
from moe_pretrain.moe.routers.base import LinearRouter
from moe_pretrain.moe.routers.config import RouterConfig
from moe_pretrain.moe.types import ExpertShard

GroupName = Literal["embedding", "head", "norms", "attention", "router", "experts", "ffn"]
GROUP_NAMES: tuple[GroupName, ...] = get_args(GroupName)
"""``router`` holds all of a routing scheme's own weights, so the ``W_down`` of Autonomy-of-Experts too; ``experts`` has
those that are no networks too, and the maps to and from their own width; ``ffn`` the dense networks and the
shared experts; ``embedding`` also the output head where the two are tied."""
Reads = Literal["hidden", "inner", "latent", "rank", "fixed", "nothing"]

_GROUP_OF: dict[type[nn.Module], GroupName] = {
    nn.Embedding: "embedding",
    nn.Linear: "head",
    RMSNorm: "norms",
    ResidualNorm: "norms",
    Attention: "attention",
    SwiGLUExperts: "experts",
    FactorisedExperts: "experts",
    MergedExperts: "experts",
    MatrixProductExperts: "experts",
    ConstantExpert: "experts",
    LatentMaps: "experts",
    SwiGLU: "ffn",
}


@dataclass(frozen=True)
class ParameterRole:
    """Place of one parameter in the model.

    Attributes:
        group: Its group.
        reads: What a matrix multiplies: the residual stream or attention's heads (``hidden``), the inner activation of
            an expert or FFN (``inner``), the width that experts have for themselves (``latent``), the ``rank`` numbers
            between two maps that stand in the place of one, or something of a user's own router that does not grow
            (``fixed``). ``nothing`` for vectors, the embedding and the head.
        is_final_norm: Whether it is the norm before the head.
        writes_residual: Whether what it makes is added to the residual stream.
        rows: Rows of the hidden layers' matrices that stand one below the other in it, or in each expert's part of it:
            those of query, key and value, or of gate and up. Empty for what is no matrix of a hidden layer: routers,
            vectors, the one row of a shared-expert gate, embedding, head.
        columns: Columns of these matrices.
        is_interleaved: Whether the first row of every matrix comes before the second row of any, as in merged experts,
            whose rows are sharded over the ranks of an expert group: ``rows`` are those of all these ranks.
    """

    group: GroupName
    reads: Reads
    is_final_norm: bool = False
    writes_residual: bool = False
    rows: tuple[int, ...] = ()
    columns: int = 0
    is_interleaved: bool = False

    def matrices(self, parameter: Tensor) -> Iterator[tuple[int, int, int]]:
        """Matrices of ``parameter`` in their order: how many alike, their rows and columns."""
        alike: list[int] = list(self.rows)
        if not alike:
            return
        if self.is_interleaved:
            yield parameter[0, ..., 0].numel(), alike[0], self.columns
            return
        count = parameter.numel() // (sum(alike) * self.columns)
        if len(set(alike)) == 1:
            yield count * len(alike), alike[0], self.columns
            return
        for _ in range(count):
            for rows in alike:
                yield 1, rows, self.columns


def parameter_roles(model: DecoderLM) -> dict[str, ParameterRole]:
    """Role of every parameter of ``model`` by name, each once."""
    routers = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Router))
    found = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full_name = f"{module_name}.{name}"
            group = "router" if full_name.startswith(routers) else _GROUP_OF[type(module)]
            rows, columns = _matrix_sizes(module, name, parameter, group)
            found[full_name] = ParameterRole(
                group=group,
                reads=_reads(module, name, parameter, group, model.config),
                is_final_norm=module is model.norm,
                writes_residual=name == "out_weight" and not in_latent_width(module, model.config),
                rows=rows,
                columns=columns,
                is_interleaved=isinstance(module, MergedExperts),
            )
    return found


def in_latent_width(module: nn.Module, config: ModelConfig) -> bool:
    """Whether ``module`` holds experts that read and return rows of another width than the residual stream's."""
    return config.moe.latent_size is not None and isinstance(module, SwiGLUExperts | MatrixProductExperts)


def _reads(module: nn.Module, name: str, parameter: Tensor, group: GroupName, config: ModelConfig) -> Reads:
    if parameter.ndim < 2 or group in ("embedding", "head"):
        return "nothing"
    if isinstance(module, LatentMaps):
        return "hidden" if name == "in_weight" else "latent"
    if name == "in_weight" and in_latent_width(module, config):
        return "latent"
    if name == "out_weight" and group in ("experts", "ffn"):
        return "inner"
    if isinstance(module, QueryKey) and name == "key_weight":
        return "inner" if module.reads == "activation" else "rank"
    if isinstance(module, FactorisedExperts) and name == "up_weight":
        return "rank"
    if isinstance(module, LinearRouter) and module.projection is not None and name == "weight":
        return "rank"
    if group == "attention":  # its heads together are as wide as the model, or grow with it
        return "hidden"
    return "hidden" if parameter.shape[-1] == config.hidden_size else "fixed"


def _matrix_sizes(module: nn.Module, name: str, parameter: Tensor, group: GroupName) -> tuple[tuple[int, ...], int]:
    """``ParameterRole.rows`` and ``columns``."""
    is_hidden = group in ("attention", "experts", "ffn") and not isinstance(module, ConstantExpert)
    if parameter.ndim < 2 or not is_hidden or name == "gate_weight":
        return (), 0
    if isinstance(module, MergedExperts):  # out matrices lie transposed
        return (module.width,), parameter.shape[-1]
    if isinstance(module, MatrixProductExperts):
        rows, columns = core_matrix(parameter.shape[-4:])
        return ((rows,), columns) if min(rows, columns) > 1 else ((), 0)
    rows, columns = parameter.shape[-2:]
    if isinstance(module, Attention) and name == "qkv_weight":
        return tuple(module.sizes), columns
    is_gate_and_up = isinstance(module, SwiGLU | SwiGLUExperts) and name == "in_weight"
    return ((rows // 2, rows // 2) if is_gate_and_up else (rows,)), columns


def base_fan_in(reads: Reads, config: ModelConfig) -> float:
    """Fan-in at which the rate and the spread of a matrix have the factor 1."""
    base = config.mup_base_width
    latent = base * config.moe.routed_size(config.hidden_size) / config.hidden_size  # the same share of the width
    return {"hidden": base, "inner": 2 * base, "latent": latent, "rank": base / 4}[reads]


def rate_scale(role: ParameterRole, parameter: Tensor, config: ModelConfig, width_power: float = 1.0) -> float:
    """Factor of a parameter's learning rate that ``model.init`` asks for; 1 unless that is ``mup``.

    Args:
        role: The parameter's.
        parameter: The parameter.
        config: The model.
        width_power: Power of base fan-in over fan-in: 1 where the size of an update's elements is the rate's, 1/2 where
            that of its singular values over the root of the width is (``optimizer=muon``).
    """
    if config.init != "mup":
        return 1.0
    if role.is_final_norm:
        return config.mup_base_width / config.hidden_size
    if role.reads in ("nothing", "fixed"):
        return 1.0
    scale: float = (base_fan_in(role.reads, config) / parameter.shape[-1]) ** width_power
    return scale * config.mup_base_layers / config.num_layers if role.writes_residual else scale


def meta_model(config: ModelConfig, router: RouterConfig) -> DecoderLM:
    """The model without storage, to ask what parameters it has."""
    with torch.device("meta"):
        return DecoderLM(config, router, ExpertShard())
