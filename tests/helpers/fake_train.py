"""Stands in for ``moe-pretrain train`` as a sweep's jobs: leaves what a run leaves, in milliseconds.

``behaviour.json`` in the sweep's folder says by name of the job what it does:
    finish        it makes its steps, the default
    fail, diverge it says why, records it, and exits with 2
    refuse        it says why and exits with 2 before its first row
    die           SIGKILL takes it after its first row
    wait          it waits for a signal and is stopped by it
    deaf          it ignores every signal that can be ignored
    meet          it finishes once two jobs have started
"""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path


def main() -> int:
    values = dict(word.split("=", 1) for word in sys.argv[1:])
    sweep = Path(values["run.output_dir"].strip("'"))
    folder = sweep / values["run.name"].strip("'")
    chosen = json.loads((sweep / "behaviour.json").read_text()) if (sweep / "behaviour.json").exists() else {}
    act = chosen.get(folder.name, "finish")
    (folder / "threads.txt").write_text(os.environ.get("OMP_NUM_THREADS", ""))
    if act == "refuse":
        print("moe-pretrain train: data.paths=missing must exist\nmore output", file=sys.stderr)
        return 2
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN if act == "deaf" else lambda number, frame: asked.append(number))
    (folder / "config.yaml").write_text("seed: 1\n")
    rows = [{"kind": "train", "step": 1, "tokens": 1, "seconds": 1.0, "attempt": 0, "train/loss": 4.0}]
    write(folder, rows)
    if act == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    while not asked and (act in ("wait", "deaf") or act == "meet" and len(list(sweep.glob("*/config.yaml"))) < 2):
        time.sleep(0.01)
    if asked:
        write(folder, [event("stopped", "by SIGTERM")])
        return 75
    if act in ("fail", "diverge"):
        name, message = {"fail": ("failed", "a failure"), "diverge": ("diverged", "loss=nan")}[act]
        write(folder, [event(name, message)])
        print(f"moe-pretrain train: {message}", file=sys.stderr)
        return 2
    loss = 3.5 + abs(math.log10(float(values.get("optimizer.learning_rate", 1))))
    validation = {"kind": "validation", "step": 2, "tokens": 2, "seconds": 2.0, "attempt": 0, "validation/loss": loss}
    write(folder, [validation, event("finished", "after 2 steps")])
    return 0


def event(name: str, message: str) -> dict:
    place = {"step": 2, "tokens": 2, "seconds": 2.0, "attempt": 0}
    return {"kind": "event", **place, "event": name, "message": message}


def write(folder: Path, rows: list[dict]) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
