"""Which rows a sick step read, written down so that it can be replayed."""

import json
from dataclasses import dataclass
from pathlib import Path

SICK_STEPS = "sick_steps"


@dataclass(frozen=True)
class SickRows:
    """The notes of a run folder on sick steps.

    Attributes:
        folder: The run's folder.
        rows_per_step: Rows of one step over all ranks.
        corpus_fingerprint: Of what the rows are rows of.
        is_main: Whether this rank writes.
    """

    folder: Path
    rows_per_step: int
    corpus_fingerprint: str
    is_main: bool

    def note(self, step: int, reason: str) -> str:
        """Write down which rows ``step`` of the data has; in words, where."""
        first = step * self.rows_per_step
        rows = {"first_row": first, "last_row": first + self.rows_per_step - 1}
        path = self.folder / SICK_STEPS / f"step_{step:08d}.json"
        facts = {
            "step": step,
            "reason": reason,
            **rows,
            "corpus_fingerprint": self.corpus_fingerprint,
            "replay": f"resume from a checkpoint of at most {step} steps: step {step} reads these rows again",
        }
        if self.is_main:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(facts, indent=2) + "\n")
            except OSError as error:
                return f"rows {first} to {rows['last_row']} of the run's order ({path} cannot be written: {error})"
        return f"its rows are in {path}"
