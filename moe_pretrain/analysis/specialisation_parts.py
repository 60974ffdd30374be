"""Do experts specialise? Information between a token's expert and its class, in bits. Pure functions and one tally.

``E`` is a token's expert and ``Y`` its class. ``hard`` takes the expert of the largest weight, ``soft`` shares a token
out among its experts by weight. With ``joint [classes, experts]`` the number, or mass, of tokens of each pair:
``I(E;Y) = H(E) + H(Y) - H(E,Y)``, ``H(E|Y) = H(E,Y) - H(Y)``, 0 log 0 = 0.

Source:
    Krishnamurthy et al. 2023 (arXiv:2302.14703) and its released code: I(E;Y), H_s, H_u, all in bits here. There ``Y``
    is the class that the expert predicts; here it is what the token is, so a wrong model cannot look specialised.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_pretrain.moe.types import Routing


@dataclass(frozen=True)
class Information:
    """What experts and classes say of each other, bits.

    Attributes:
        mutual: ``I(E;Y)``, from 0 when they are independent to ``min(H(E), H(Y))``.
        experts_given_class: ``H(E|Y)``.
        experts: ``H(E)``, at most log2 of the number of experts; of soft mass it is the paper's ``H_u``.
        classes: ``H(Y)``.
    """

    mutual: float
    experts_given_class: float
    experts: float
    classes: float


@dataclass(frozen=True)
class Specialisation:
    """One layer against one kind of class, bits.

    Attributes:
        hard: Of the expert with the largest weight.
        soft: Of the mass of all weights.
        hard_shuffled: ``I(E;Y)`` of ``hard`` with classes dealt out anew: what a finite sample alone makes, about
            ``(experts - 1) (classes - 1) / (2 tokens ln 2)``.
        soft_shuffled: The same of ``soft``.
        gate_entropy: The paper's ``H_s``: mean over tokens of the entropy of their weights.
        tokens: Tokens counted: those with a class and an expert.
    """

    hard: Information
    soft: Information
    hard_shuffled: float
    soft_shuffled: float
    gate_entropy: float
    tokens: int


def entropy(mass: Float[Tensor, "..."]) -> Tensor:
    """Entropy in bits of each last axis of ``mass``, which need not sum to 1; 0 where there is none."""
    share = mass / mass.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny)
    return -torch.special.xlogy(share, share).sum(dim=-1) / torch.log(torch.tensor(2.0, dtype=mass.dtype))


def information(joint: Float[Tensor, "classes experts"]) -> Information:
    """``Information`` of a joint mass, which need not sum to 1; float64 for exact counts."""
    of_experts, of_classes, of_both = (float(entropy(mass)) for mass in (joint.sum(0), joint.sum(1), joint.flatten()))
    return Information(of_experts + of_classes - of_both, of_both - of_classes, of_experts, of_classes)


def gate_of(routing: Routing, num_tokens: int, num_experts: int) -> Float[Tensor, "tokens experts"]:
    """The weights of each token's routes as shares of their sum, float64; zeros for a token without a positive weight.

    It works for every scheme, and is the distribution over the experts that act, not over all that were considered.
    """
    gate = torch.zeros(num_tokens, num_experts, dtype=torch.float64, device=routing.weight.device)
    weight = routing.weight.detach().double().clamp(min=0)
    gate = gate.index_put((routing.token_index, routing.expert_index), weight)
    total = gate.sum(dim=1, keepdim=True)
    return torch.where(total > 0, gate / total, 0.0)


def most_frequent_classes(token_ids: Int[Tensor, "tokens"], num_classes: int) -> Int[Tensor, "tokens"]:
    """Class of each token by its id: the ``num_classes - 1`` most frequent ids have one each, all others the last."""
    ids, inverse, counts = token_ids.unique(return_inverse=True, return_counts=True)
    kept = counts.sort(descending=True, stable=True).indices[: num_classes - 1]
    class_of_id = torch.full_like(ids, num_classes - 1)
    class_of_id[kept] = torch.arange(len(kept))
    return class_of_id[inverse]


class Tally:
    """Adds up one layer's gates, part by part."""

    def __init__(self, num_classes: int, num_experts: int):
        self._joint = torch.zeros(4, num_classes, num_experts, dtype=torch.float64)  # hard, soft, and both shuffled
        self._gate_entropy = 0.0
        self._tokens = 0

    def add(
        self,
        gate: Float[Tensor, "tokens experts"],
        classes: Int[Tensor, "tokens"],
        shuffled_classes: Int[Tensor, "tokens"],
    ) -> None:
        """Count tokens by ``classes``, and again by the same classes dealt out at random over all parts."""
        routed = gate.sum(dim=1) > 0
        gate = gate[routed]
        hard = torch.nn.functional.one_hot(gate.argmax(dim=1), gate.shape[1]).to(gate.dtype)
        for row, dealt in ((0, classes), (2, shuffled_classes)):
            self._joint[row].index_add_(0, dealt[routed], hard)
            self._joint[row + 1].index_add_(0, dealt[routed], gate)
        self._gate_entropy += float(entropy(gate).sum())
        self._tokens += len(gate)

    def result(self) -> Specialisation:
        """What all parts together say."""
        hard, soft, hard_shuffled, soft_shuffled = (information(joint) for joint in self._joint)
        gate_entropy = self._gate_entropy / max(1, self._tokens)
        return Specialisation(hard, soft, hard_shuffled.mutual, soft_shuffled.mutual, gate_entropy, self._tokens)
