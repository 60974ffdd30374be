"""Run folders whose numbers are known, for the comparison to find."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml

from moe_pretrain.run_folder.probe import Probe, ProbeFiles

STEPS, TOKENS, EXPERTS, LAYERS = 100, 1000, 8, 2
DOCUMENT_LOSSES = tuple(np.linspace(-0.5, 0.5, 20))


@dataclass
class Planted:
    """A run folder to be written; ``loss`` is that of its last validation."""

    name: str
    loss: float
    seed: int = 1
    router: dict = field(default_factory=lambda: {"name": "top_k", "top_k": 2})
    other: dict = field(default_factory=dict)
    steps: int = STEPS
    end: tuple[str, str] | None = ("finished", "after 100 steps")
    fingerprint: str = "corpus"
    bytes_per_token: float = 4.0
    experts_per_token: float = 2.0
    token_hash: str = ""
    by_document: tuple[float, ...] | None = DOCUMENT_LOSSES  # what each adds to the loss; None for no file
    facts: dict = field(default_factory=dict)
    microseconds: dict[str, float] = field(default_factory=dict)  # of the parts of a MoE layer, at the end

    def rows(self) -> list[dict]:
        rows = []
        for step in range(1, self.steps + 1):
            base = {"step": step, "tokens": step * TOKENS, "seconds": step * 0.6, "attempt": 0}
            loss = self.loss + 3 * math.exp(-6 * step / STEPS) - 3 * math.exp(-6)
            row = {
                "kind": "train",
                **base,
                "train/loss": loss,
                "train/tokens_per_second": 2000.0 + step,
                "train/step_seconds": 0.5,
                "train/flops_per_token": 1e6 * (1 + self.experts_per_token),
                "data/token_hash": self.token_hash or f"{self.seed}-{step}",
            }
            for layer in range(LAYERS):
                share = np.linspace(1, 1.5, EXPERTS)
                share /= share.sum()
                row |= {
                    f"moe/layer_{layer:02d}/expert_share": share.tolist(),
                    f"moe/layer_{layer:02d}/load_max_over_mean": share.max() * EXPERTS + layer,
                    f"moe/layer_{layer:02d}/experts_per_token": self.experts_per_token + layer,
                    f"moe/layer_{layer:02d}/router_entropy": 1.5,
                    f"moe/layer_{layer:02d}/dead_experts": float(step <= 85),
                }
            rows.append(row)
            if step % 20 == 0:
                bits = loss / math.log(2) / self.bytes_per_token
                row = {"validation/loss": loss, "validation/bits_per_byte": bits}
                drift = {f"moe/layer_{layer:02d}/routing_drift": 10 / step for layer in range(LAYERS)}
                times = {
                    f"moe/{name}_microseconds_per_token": step / STEPS * t for name, t in self.microseconds.items()
                }
                rows.append({"kind": "validation", **base, **row, **drift, **times})
        if self.end:
            rows.append({"kind": "event", **base, "event": self.end[0], "message": self.end[1]})
        return rows

    def write(self, root: Path) -> Path:
        folder = root / self.name
        folder.mkdir(parents=True)
        config = {
            "seed": self.seed,
            "run": {"name": self.name, "output_dir": str(root)},
            "model": {"name": "tiny", "sequence_length": 10},
            "router": self.router,
            "batch": {"global_batch_tokens": TOKENS, "total_tokens": STEPS * TOKENS},
            "optimizer": {"learning_rate": 0.001},
            "metrics": {"log_every_steps": 1, "router_health_steps": 100},
            "spike": {"window_steps": 100},
        }
        for key, value in self.other.items():
            part, _, name = key.partition(".")
            config.setdefault(part, {})[name] = value
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        facts = {"corpus_fingerprint": self.fingerprint, "versions": {"torch": "2.13"}, "device": "cpu"}
        facts |= {"total_parameters": 900, "active_parameters": 500, **self.facts}
        (folder / "summary.json").write_text(json.dumps(facts))
        self.write_probe(folder)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in self.rows()))
        return folder

    def write_probe(self, folder: Path) -> None:
        """Two pieces of 50 tokens for each document, at the last validation."""
        losses = [row for row in self.rows() if row["kind"] == "validation"]
        if not losses or self.by_document is None:
            return
        document = np.repeat(np.arange(len(self.by_document)), 2)
        added = np.array(self.by_document)[document]
        probe = Probe(
            step=losses[-1]["step"],
            fingerprint=self.fingerprint,
            share=np.ones(1),
            set_index=np.zeros(len(document), dtype=np.int64),
            document=document,
            tokens=np.full(len(document), 50),
            loss=50 * (losses[-1]["validation/loss"] + added - added.mean()),
            layer=np.arange(LAYERS),
            routes=np.zeros((LAYERS, 5), dtype=np.int64),
        )
        ProbeFiles(folder).write(probe)


TOP_P = {"name": "top_p", "threshold": 0.4}
AUTONOMY = {"name": "autonomy", "gate_rank": 32}
BASE = {1: 3.00, 2: 3.10, 3: 2.95}  # what the seed does to the loss
TOP_P_IS_WORSE_BY = {1: 0.049, 2: 0.050, 3: 0.051}
AUTONOMY_DIFFERS_BY = {1: 0.01, 2: -0.02, 3: 0.015}


def plant_sweep(root: Path) -> Path:
    """Three schemes, three seeds: ``top_p`` is worse, ``autonomy`` is not distinguishable from ``top_k``."""
    for seed, loss in BASE.items():
        Planted(f"top_k-{seed}", loss, seed).write(root)
        Planted(f"top_p-{seed}", loss + TOP_P_IS_WORSE_BY[seed], seed, TOP_P, experts_per_token=3.0).write(root)
        Planted(f"deep/autonomy-{seed}", loss + AUTONOMY_DIFFERS_BY[seed], seed, AUTONOMY).write(root)
    return root
