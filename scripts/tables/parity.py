"""Every topology, every way to take the step, against the oracle: one line per topology with the worst errors.

    bash scripts/parity.sh [4x2] [bfloat16] [--covering]

Words restrict it to lines of the table: a topology (ranks x expert-parallel size), a dtype, or both.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from helpers.parity import TOPOLOGIES, all_cases, covering_cases, run_cases

DTYPES = ("float32", "bfloat16")


def main() -> int:
    """Run the whole product and print the table; 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*(f"{ranks}x{size}" for ranks, size in TOPOLOGIES), *DTYPES]
    parser.add_argument("lines", nargs="*", metavar="LINE", help=f"of the table: {', '.join(names)}")
    parser.add_argument("--covering", action="store_true", help="only a part in which any two choices meet")
    options = parser.parse_args()
    if unknown := [line for line in options.lines if line not in names]:
        parser.error(f"{unknown[0]} must be one of {', '.join(names)}")
    failed = 0
    header = True
    cases = covering_cases() if options.covering else all_cases()
    for dtype in DTYPES:
        for ranks, size in TOPOLOGIES:
            if not {f"{ranks}x{size}", dtype} >= set(options.lines):
                continue
            own = [case for case in cases if (case.ranks, case.expert_parallel_size) == (ranks, size)]
            own = [case for case in own if case.dtype == dtype]
            started = time.perf_counter()
            results = run_cases(own, timeout=7200)
            worst: dict[str, float] = {}
            for case, rows in results.items():
                for row in rows:
                    worst[row.quantity] = max(worst.get(row.quantity, 0.0), row.error)
                    if not row.is_same:
                        failed += 1
                        print(f"DIFFERS: {case}: {row}")
            if header:
                print("topology        cases " + "".join(f"{name:>19}" for name in worst) + "  seconds")
                header = False
            seconds = time.perf_counter() - started
            name = f"{ranks}x{size} {dtype}"
            print(
                f"{name:<15} {len(own):>5} " + "".join(f"{e:>19.1e}" for e in worst.values()) + f"  {seconds:.0f}",
                flush=True,
            )
    if header:
        parser.error(f"{' '.join(options.lines)} must be a topology, a dtype, or one of each")
    print("the same as the oracle everywhere" if not failed else f"{failed} quantities differ")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
