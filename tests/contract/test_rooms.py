"""The unit tests lie in the rooms of what they test."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
WITHOUT_ROOM = {"test_known_defects.py"}
"""Tests of the package as a whole: each of them is named by a row of a table."""


def test_every_folder_of_unit_tests_has_its_room():
    unit = ROOT / "tests" / "unit"
    folders = {path.parent.relative_to(unit) for path in unit.rglob("test_*.py")}
    rooms = {path.parent.relative_to(ROOT / "moe_pretrain") for path in (ROOT / "moe_pretrain").rglob("*.py")}
    assert len(folders) > 10 and not folders - rooms, "no such folder in moe_pretrain"
    assert {path.name for path in unit.glob("*.py")} == WITHOUT_ROOM, "the package has rooms: so have its tests"
