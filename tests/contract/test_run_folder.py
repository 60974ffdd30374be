"""The run folder's format is known at one place: file names in the map, each file parsed beside its writer."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_pretrain.run_folder import paths

PACKAGE = Path(__file__).parents[2] / "moe_pretrain"
MAP = "run_folder/paths.py"
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if str(path.relative_to(PACKAGE)) != MAP]
NAMES = {
    value
    for name, value in vars(paths).items()
    if name.isupper() and isinstance(value, str) and name not in ("PROBES", "WANDB", "SWEEP_LOCK")
}
"""Left out: "probe" and "wandb", which are words and a package as well, and ".lock", a suffix of other locks."""


def strings_of_code(tree: ast.AST) -> Iterator[ast.Constant]:
    """String literals that are not docstrings."""
    texts = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
            yield node


def spelt_names(source: str) -> list[str]:
    """Names of the map that stand in code as a path, or of files as a part of one.

    A name within a sentence is a message, and a folder within a longer path an example for the user.
    """
    return [
        f"line {node.lineno}: {name}"
        for node in strings_of_code(ast.parse(source))
        for name in NAMES
        if name == node.value or (Path(name).suffix and name in node.value.split("/"))
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_file_names_of_a_run_are_spelt_in_the_map_only(path: Path):
    assert spelt_names(path.read_text(encoding="utf-8")) == [], f"import the name from {MAP}"


def test_a_spelt_name_is_found_and_words_about_it_are_not():
    spelt = 'def read(folder):\n    """config.yaml"""\n    return folder / "config.yaml", f"{folder}/metrics.jsonl"\n'
    assert spelt_names(spelt) == ["line 3: config.yaml", "line 3: metrics.jsonl"]
    assert spelt_names('say("see config.yaml")\n') == []


def test_every_name_of_the_map_has_a_user():
    defined = [name for name in vars(paths) if not name.startswith("_") and name not in ("Path", "re")]
    sources = [path.read_text() for path in FILES]
    within = (PACKAGE / MAP).read_text()
    unused = [name for name in defined if not any(name in text for text in sources) and within.count(name) < 2]
    assert unused == []


PARSERS = {
    "CONFIG_FILE": {"run_folder/provenance.py"},
    "SUMMARY_FILE": {"run_folder/provenance.py"},
    "OVERRIDES_FILE": {"run_folder/provenance.py"},
    "REWINDS_FILE": {"run_folder/rewinds.py"},
    "OWNER_FILE": {"run_folder/lock.py"},
    "JOB_FILE": {"sweep/job_record.py"},
    "STATE_FILE": {"sweep/job_record.py"},
    "SLURM_FILE": {"sweep/slurm.py"},
    "TUNE_FILE": {"run_folder/tune_record.py"},
    "SPECIALISATION_FILE": {"analysis/findings.py"},
    "CERTIFICATE": {"analysis/findings.py"},
}
"""File of a run or sweep -> the one place that reads it."""
READS = {"read_text", "read_bytes", "read_json", "read_finding", "open", "safe_load", "load", "loads"}


def readers(source: str) -> set[str]:
    """Names of the map that stand in a call that reads, as its argument or its object."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in READS:
                found |= {each.id for each in ast.walk(node) if isinstance(each, ast.Name)} & PARSERS.keys()
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_each_kind_of_file_is_read_at_one_place(path: Path):
    name = str(path.relative_to(PACKAGE))
    strangers = {file for file in readers(path.read_text(encoding="utf-8")) if name not in PARSERS[file]}
    assert not strangers, f"{name} reads {sorted(strangers)}; so does {[sorted(PARSERS[file]) for file in strangers]}"


def test_a_second_reader_is_found():
    assert readers("values = yaml.safe_load((folder / CONFIG_FILE).read_text())\n") == {"CONFIG_FILE"}


WRITERS = {
    "system/files.py": "the one way in which a file replaces another",
    "system/file_lock.py": "a lock has no content",
    "run_folder/lock.py": "the owner's lock, whose line is for people",
    "run_folder/metrics_file.py": "rows are appended, and a torn last one is dropped",
    "sweep/running_job.py": "the log of a job's process is appended to",
    "cli.py": "the null device takes what a reader that has gone does not",
    "data/stream/shard_stream.py": "an empty file shows ranks that they see one folder",
    "parallel/heartbeat.py": "stacks are written while the process dies",
}
"""File of the package that writes by itself -> why a file that is half written does no harm there."""
_WRITING_CALLS = {
    *("write_text", "write_bytes", "touch", "tofile", "savez", "savez_compressed", "to_csv", "symlink_to", "dump"),
    *("copy", "copy2", "copyfile", "copytree", "save_file", "savefig"),
}
_WRITING_FLAGS = {"O_WRONLY", "O_RDWR", "O_CREAT", "O_APPEND", "O_TRUNC"}
_OF_MEMORY = {"buffer", "content"}
"""Names of ``io`` objects that something is saved to before it is written whole."""


def writes(source: str) -> list[str]:
    """Calls that put something into a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = (
            node.func.value.id if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name) else ""
        )
        texts = [
            each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)
        ]
        first = node.args[0].id if node.args and isinstance(node.args[0], ast.Name) else ""
        is_copy_of_value = name == "copy" and owner != "shutil"
        if name in _WRITING_CALLS and not is_copy_of_value and first not in _OF_MEMORY:
            found.append(f"line {node.lineno}: {name}")
        if name in ("open", "fdopen") and any(
            set(text) <= set("rwaxbt+") and set(text) & set("wax+") for text in texts
        ):
            found.append(f"line {node.lineno}: open for writing")
        if (
            name == "open"
            and {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute)} & _WRITING_FLAGS
        ):
            found.append(f"line {node.lineno}: os.open for writing")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_written_whole_by_one_function(path: Path):
    name = str(path.relative_to(PACKAGE))
    found = writes(path.read_text())
    assert found == [] or name in WRITERS, (
        f"{name}: {found}; use write_whole, write_json or WholeFile of system/files.py"
    )


@pytest.mark.parametrize("name", WRITERS)
def test_every_writer_that_is_excused_writes(name: str):
    assert writes((PACKAGE / name).read_text())


@pytest.mark.parametrize(
    "line",
    [
        "path.write_text('x')",
        "open(path, 'w')",
        "path.open('ab')",
        "np.savez(path, a=1)",
        "shutil.copy(a, b)",
        "json.dump(values, file)",
        "os.open(path, os.O_RDWR | os.O_CREAT)",
    ],
)
def test_a_writer_is_found(line: str):
    assert writes(line)
    assert not writes("path.open('rb'); open(path); values.copy(); np.savez(buffer, a=1); os.open(path, os.O_RDONLY)")
