"""A working folder for runs."""

import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a small corpus."""
    folder = tmp_path_factory.mktemp("home")
    rows = "".join(json.dumps({"text": topics[name]}) + "\n" for name in sorted(topics))
    (folder / "corpus.jsonl").write_text(rows)
    return folder
