"""Plain top-k of the logits: what S-BASE does when no tokens compete."""

from typing import Any

from torch import Tensor, nn

from moe_pretrain.huggingface.remote_code.common import Facts, empty, gates_of, logits_of

SCHEMES = ("sinkhorn",)


class Router(nn.Module):
    """The ``top_k`` largest logits, weighted by softmax or sigmoid, not renormalised."""

    float32_parts = ["router"]

    def __init__(self, config: Any, layer: int):
        super().__init__()
        self.fields = config.router
        self.weight = empty(config.num_experts, config.hidden_size)
        self.logit_bias = empty(config.num_experts) if self.fields["bias"] else None

    def forward(self, hidden: Tensor, facts: Facts) -> Tensor:
        """Gates ``[tokens, experts]``, 0 where an expert is not taken."""
        logits = logits_of(self, hidden)
        scores = logits.softmax(dim=-1) if self.fields["score"] == "softmax" else logits.sigmoid()
        chosen = logits.sort(dim=-1, descending=True, stable=True).indices[:, : self.fields["top_k"]]
        return gates_of(chosen, scores.gather(1, chosen), len(self.weight))
