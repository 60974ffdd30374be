"""Print the certificates of all shipped schemes as one Markdown table with notes, for the README.

    python scripts/tables/certificate_table.py [--schemes top_k top_p]

Every cell is asked of the scheme on the spot, on one process and, with `verify`, on two with experts spread over both.
"""

import argparse
import subprocess
import sys

from moe_pretrain.config.compose import config_folder
from moe_pretrain.config.load import load
from moe_pretrain.verify.certificate.certify import PropertyResult, examine

COLUMNS = {
    "causal in training": ["causality in training"],
    "causal in evaluation": ["causality in evaluation"],
    "same in any batch": [
        "batch of one in evaluation",
        "cut of the batch in evaluation",
        "cut of the batch in training",
    ],
    "documents apart": ["documents apart in training", "documents apart in evaluation"],
    "evaluation": ["no seed or step in evaluation", "evaluation as in training"],
    "large batch": ["large batch in training", "large batch in evaluation"],
    "padding, determinism": ["padding ignored", "determinism"],
    "steps, layers, long rows, cache": ["every step and layer", "long rows", "a new token alone"],
    "best tokens, experts alike": ["experts get their best tokens", "experts are alike"],
    "declared counts, fields read, nothing else moved": [
        "experts per token as declared",
        "other numbers of experts",
        "every field is read",
        "leaves alone what it is given",
    ],
    "noise": ["noise"],
    "losses, entropy, coefficients": [
        "losses are means of the text",
        "entropy and losses at uniform",
        "coefficients act once",
    ],
    "state evens load": [
        "state evens the load",
        "state leaves weights alone",
        "state keeps the number of experts",
        "after many steps of state",
    ],
    "routes, combine, weights": [
        "conservation of routes",
        "combine of identity experts",
        "weights add up as configured",
    ],
    "float32": ["float32 routing"],
    "LM gradient": ["router gradient from the LM loss"],
    "... at k = 1": ["router gradient with top_k=1"],
    "balance loss": ["balance loss at uniform", "balance loss at collapse", "losses even the load"],
    "no text, ties, recompute": ["no text tokens", "finite at ties", "recompute"],
    "derivatives": ["aux losses move the router", "weights' gradient is a derivative"],
    "state": ["aux losses named", "state round trip", "state alike on ranks"],
    "loudness": ["loudness at the start"],
    "gradients, 1 and 2 ranks": ["gradient parity with the oracle"],
}

_NO_SCHEMES = ("dense", "by_layer")
"""Choices of the group ``router`` that route nothing, or by other choices."""


def main() -> None:
    shipped = sorted(file.stem for file in (config_folder() / "router").glob("*.yaml") if file.stem not in _NO_SCHEMES)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", default=shipped, choices=shipped, metavar="SCHEME")
    schemes = parser.parse_args().schemes
    notes: dict[str, int] = {}
    print("| `router=` | " + " | ".join(COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for scheme in schemes:
        overrides = [f"router={scheme}"]
        rows = {row.property: row for row in examine(load(overrides))}
        left_out = rows.keys() - {name for names in COLUMNS.values() for name in names}
        assert not left_out, f"rows without a column: {left_out}"
        cells = {title: cell([rows[name] for name in names], notes) for title, names in COLUMNS.items()}
        if not same_on_ranks(overrides):
            cells["gradients, 1 and 2 ranks"] = "**FAIL**"
        print(f"| `{scheme}` | " + " | ".join(cells.values()) + " |", flush=True)
    print()
    for text, number in notes.items():
        print(f"{number}. {text}")


def cell(rows: list[PropertyResult], notes: dict[str, int]) -> str:
    """`pass`, or numbers of the notes that say why not."""
    if any(row.verdict == "FAIL" for row in rows):
        return "**FAIL**"
    marks = []
    for row in rows:
        if row.verdict != "PASS":
            marks.append(str(notes.setdefault(f"{row.property}: {row.verdict}, {row.detail}", len(notes) + 1)))
    passed = any(row.verdict == "PASS" for row in rows)
    return " ".join([*(["pass"] if passed else []), *([f"({', '.join(marks)})"] if marks else [])])


def same_on_ranks(overrides: list[str]) -> bool:
    """Whether two ranks, experts spread over both, train like the oracle."""
    words = [*overrides, "parallel.processes=2", "parallel.expert_parallel_size=2"]
    done = subprocess.run([sys.executable, "-m", "moe_pretrain", "verify", *words], capture_output=True)
    return done.returncode == 0


if __name__ == "__main__":
    main()
