"""Plain top-k of the logits: what S-BASE does when no tokens compete."""

from torch import Tensor

from moe_pretrain.huggingface.remote_code.common import Facts, LinearRouter, gates_of

SCHEMES = ("sinkhorn",)


class Router(LinearRouter):
    """The ``top_k`` largest logits, weighted by softmax or sigmoid, not renormalised."""

    def forward(self, hidden: Tensor, facts: Facts) -> Tensor:
        """Gates ``[tokens, experts]``, 0 where an expert is not taken."""
        logits = self.logits(hidden)
        scores = logits.softmax(dim=-1) if self.fields["score"] == "softmax" else logits.sigmoid()
        chosen = logits.sort(dim=-1, descending=True, stable=True).indices[:, : self.fields["top_k"]]
        return gates_of(chosen, scores.gather(1, chosen), len(self.weight))
