"""A routing scheme is added by its own files: nothing in the package lists schemes or asks which one it has."""

import importlib
import re
import sys
import types
from pathlib import Path

import pytest
import yaml

from moe_pretrain.config.compose import config_folder
from moe_pretrain.moe.routers import SHIPPED, discover
from moe_pretrain.moe.routers.base import BalancedRouter
from moe_pretrain.moe.routers.config import RouterConfig

PACKAGE = Path(__file__).parents[2] / "moe_pretrain"
NEW = """
from dataclasses import dataclass
from typing import Literal

from moe_pretrain.moe.routers.top_k import TopKRouter, TopKRouterConfig


@dataclass(frozen=True, kw_only=True)
class NearestConfig(TopKRouterConfig):
    name: Literal["{name}"]

    def build(self, hidden_size, num_experts, layer):
        return Nearest(self, hidden_size, num_experts, layer)


class Nearest(TopKRouter):
    pass
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """An importable package of schemes, empty but for what a test puts into its folder."""
    package = types.ModuleType("schemes_of_a_test")
    package.__path__ = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    yield package
    for name in [name for name in sys.modules if name.startswith(f"{package.__name__}.")]:
        del sys.modules[name]


def test_a_new_file_is_found(package: types.ModuleType, tmp_path: Path):
    (tmp_path / "nearest.py").write_text(NEW.format(name="nearest"))
    importlib.invalidate_caches()
    found = discover(package)
    assert list(found) == ["nearest"]
    assert found["nearest"].__name__ == "NearestConfig"


def test_two_schemes_of_one_name_are_refused(package: types.ModuleType, tmp_path: Path):
    for file in ("nearest", "other"):
        (tmp_path / f"{file}.py").write_text(NEW.format(name="nearest"))
    importlib.invalidate_caches()
    with pytest.raises(TypeError, match=r"nearest.NearestConfig and .*other.NearestConfig are both called 'nearest'"):
        discover(package)


def test_every_scheme_has_its_values():
    choices = {path.stem: yaml.safe_load(path.read_text()) for path in (config_folder() / "router").glob("*.yaml")}
    assert set(SHIPPED) <= set(choices)
    # Further choices are a scheme with other values, by inheritance from its file or by name.
    assert {values["name"] for values in choices.values() if "name" in values} == {*SHIPPED, "by_layer"}


@pytest.mark.parametrize("scheme", SHIPPED.values(), ids=SHIPPED)
def test_no_field_hides_a_member_of_the_base(scheme: type[RouterConfig]):
    """A dataclass takes a member of its base for a field's default, so a missing value would go unnoticed."""
    members = {name for name in vars(RouterConfig) if not name.startswith("_")}
    assert not members & set(scheme.__dataclass_fields__)


def test_nothing_outside_asks_which_scheme_it_has():
    for path in PACKAGE.rglob("*.py"):
        if path.is_relative_to(PACKAGE / "moe"):
            continue
        text = path.read_text()
        assert not re.search(r"(getattr|hasattr)\((self\.|config\.|subject\.config\.)*router, \"", text), path
        assert not re.search(r"isinstance\([\w.]*router, ", text.replace("isinstance(router, Router)", "")), path


def test_files_of_earlier_releases_find_the_bases():
    linear = importlib.import_module("moe_pretrain.moe.routers.linear")
    assert linear.BalancedRouter is BalancedRouter
    assert {"BalancedRouterConfig", "LinearRouter", "LinearRouterConfig", "router_use"} <= set(vars(linear))
