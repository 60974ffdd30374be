"""Do gains survive scale? The part of a comparison whose runs are ladders."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_pretrain.analysis.ladder import MIN_SIZES, Table, choose_reference, gain_table, gains, law_table, read_ladders
from moe_pretrain.run_folder.record import RunRecord

SCALE = 10.0
SCALING_NOTE = (
    "L = E + A N^-alpha + B D^-beta for each scheme, N the active parameters, D tokens, without runs that diverged; "
    "95% intervals from resampled residuals, which hold about 90%. Beyond the largest run of the reference "
    "the law is extrapolated: an interval holds the noise of the runs, not that the law may be another there. The "
    "command ladder looks further."
)


@dataclass(frozen=True)
class Scaling:
    """Laws of the schemes, and the gains over the reference.

    Attributes:
        laws: Table of the laws; None where there are none.
        gains: Table of the gains; None with one scheme.
        problem: Why there are no laws though there are enough sizes; else empty.
    """

    laws: Table | None
    gains: Table | None
    problem: str = ""


def scaling_of(runs: Sequence[RunRecord], root: Path) -> Scaling | None:
    """Laws of the runs below ``root``; None where there are fewer sizes than a ladder has."""
    sizes = {run.facts.get("active_parameters") for run in runs if run.state == "finished"}
    if len(sizes - {None}) < MIN_SIZES:
        return None
    try:
        ladders = read_ladders(runs, root, leave_out=True)
    except ValueError as error:
        return Scaling(None, None, str(error))
    reference = choose_reference(ladders, None)
    found = gains(ladders, reference, SCALE)
    return Scaling(law_table(ladders), gain_table(found, reference.name, SCALE) if found else None)
