"""Bootstrap over validation documents, drawn alike for all runs of the same rows: the effect of the text on a loss.

Axis names:
    resamples  bootstrap resamples of the documents
    documents  of one set
"""

import numpy as np

from moe_pretrain.run_folder.probe import Probe, ProbeFiles
from moe_pretrain.run_folder.record import RunRecord

RESAMPLES = 1000
FEW_DOCUMENTS = 10
"""With fewer documents a bootstrap knows little of what others would do."""
_SAME_LOSS = 1e-4
"""Largest relative difference between a validation's row and the mean of its probe."""


def last_probe(run: RunRecord) -> Probe | None:
    """The probe of the run's last validation; None if it has none.

    Raises:
        ValueError: The file is damaged, or of another validation.
    """
    last = run.validation[-1]
    found = ProbeFiles(run.folder).read(last["step"])
    loss = last.get("validation/loss")
    if found is not None and loss is not None and not abs(found.mean_loss - loss) <= _SAME_LOSS * abs(loss):
        raise ValueError(f"{run.name}: the probe of step {found.step} has loss {found.mean_loss:.4f}, not {loss:.4f}")
    return found


def num_documents(probe: Probe) -> int:
    """Documents over all sets, which are what is resampled."""
    return sum(len(np.unique(probe.document[probe.set_index == index])) for index in range(len(probe.share)))


def resampled_losses(probe: Probe) -> np.ndarray:
    """``Probe.mean_loss`` over resampled documents [resamples].

    Documents are drawn with replacement within each set, as many as there are. A document's tokens stay together, for
    they are not independent. The draws depend on the number of documents alone, so those of two runs of the same rows
    are the same and their losses subtract. Deviations from the loss itself are stretched by ``sqrt(n / (n - 1))``,
    for a bootstrap of n documents varies that much too little.

    Source:
        Efron 1979, Bootstrap methods: another look at the jackknife; cluster bootstrap over documents.
    """
    generator = np.random.default_rng(0)
    total = np.zeros(RESAMPLES)
    for index, share in enumerate(probe.share.tolist()):
        own = probe.set_index == index
        documents, piece = np.unique(probe.document[own], return_inverse=True)
        loss, tokens = np.bincount(piece, probe.loss[own]), np.bincount(piece, probe.tokens[own])
        count = len(documents)
        drawn = generator.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)  # [resamples, documents]
        mean = loss.sum() / tokens.sum()
        stretch = (count / (count - 1)) ** 0.5 if count > 1 else 0.0
        total += share * (mean + stretch * ((drawn @ loss) / (drawn @ tokens) - mean))
    return total
