"""Local tasks of lm-evaluation-harness: a question with choices, prose, and texts to be finished."""

import json
import random
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import yaml

QUESTIONS, TEXTS = 7, 5
NAMES = ("facts", "prose", "finish")
_COMMON = {"dataset_path": "json", "test_split": "test"}
_TASKS: dict[str, dict[str, Any]] = {
    "facts": {
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{label}}",
        "doc_to_choice": "{{choices}}",
        "num_fewshot": 1,
        "fewshot_split": "test",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
        "metadata": {"version": 2.0},
    },
    "prose": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "bits_per_byte")],
    },
    "finish": {
        "output_type": "generate_until",
        "doc_to_text": "{{start}}",
        "doc_to_target": "{{end}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 9},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


def write_tasks(folder: Path, **changes: Any) -> list[str]:
    """Task files with data beside them; ``changes`` are fields of every task. The words that name them."""
    draw = random.Random(0)
    words = sorted(set(topics["assignment"].split()))

    def text(longest: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, longest)))

    rows = {
        "facts": [
            {"question": text(12), "choices": [text(4) for _ in range(3)], "label": draw.randrange(3)}
            for _ in range(QUESTIONS)
        ],
        "prose": [{"text": text(60)} for _ in range(TEXTS)],
        "finish": [{"start": text(20), "end": text(2)} for _ in range(TEXTS)],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        data = {"dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}}}
        (folder / f"{name}.yaml").write_text(
            yaml.safe_dump({"task": name, **_COMMON, **_TASKS[name], **data, **changes})
        )
    return [str(folder / f"{name}.yaml") for name in NAMES]
