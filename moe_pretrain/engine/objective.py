"""The loss of a micro-batch. The one place where aux losses meet their coefficients."""

from dataclasses import dataclass

from torch import Tensor

from moe_pretrain.model.decoder import LMOutput


@dataclass(frozen=True)
class GlobalCounts:
    """Sizes of the whole global batch, over all ranks and micro-batches.

    Attributes:
        labels: Counted targets.
        tokens: Text tokens (not padding).
    """

    labels: int
    tokens: int


def micro_batch_loss(
    output: LMOutput, aux_weights: dict[str, float], tokens: int, global_counts: GlobalCounts
) -> Tensor:
    """This micro-batch's share of the global batch's loss; the shares of all micro-batches sum to it.

    ``loss = cross_entropy_sum / N_labels + sum_i w_i * aux_i * tokens / N_tokens``, with ``N`` over the global batch.
    So every counted token weighs the same however the batch is cut (defects C12, C20).

    Args:
        output: The model's output, aux losses unweighted.
        aux_weights: Coefficient of each aux loss.
        tokens: Text tokens of this micro-batch.
        global_counts: Sizes of the global batch.
    """
    loss = output.loss_sum / max(global_counts.labels, 1)
    share = tokens / max(global_counts.tokens, 1)
    for name, value in output.aux.items():
        if aux_weights[name]:
            loss = loss + aux_weights[name] * share * value
    return loss
