"""Every field of the configuration decides a run's result, or is listed with the reason why not."""

import dataclasses
import typing

import pytest

from moe_pretrain.config.compose import compose_values
from moe_pretrain.config.schema import Config
from moe_pretrain.engine.optimizers.base import OptimizerConfig
from moe_pretrain.run_folder.identity import DECIDING, NOT_DECIDING, decides, deciding
from moe_pretrain.run_folder.record import flatten

PARTS = {name.partition(".")[0] for name in DECIDING if "." not in name}


def fields_of(part: type, prefix: str = "") -> set[str]:
    """Dotted names of all fields below a dataclass; of a union those of every member."""
    hints = typing.get_type_hints(part)
    found: set[str] = set()
    for field in dataclasses.fields(part):
        inner = [member for kind in parts_in(hints[field.name]) for member in fields_of(kind, f"{prefix}{field.name}.")]
        found |= set(inner) or {f"{prefix}{field.name}"}
    return found


def parts_in(hint: object) -> list[type]:
    if dataclasses.is_dataclass(hint):
        return OptimizerConfig.__subclasses__() if hint is OptimizerConfig else [hint]  # type: ignore[list-item]
    if typing.get_origin(hint) in (dict, list, tuple):
        return []  # what is below has names of the user's own
    return [kind for inner in typing.get_args(hint) for kind in parts_in(inner)]


def undecided(fields: set[str]) -> list[str]:
    return sorted(
        field
        for field in fields
        if field not in NOT_DECIDING and not any(field == one or field.startswith(f"{one}.") for one in DECIDING)
    )


def test_every_field_is_in_one_of_the_lists():
    fields = fields_of(Config)
    assert len(fields) > 150 and {"model.moe.num_experts", "optimizer.beta1", "data.paths", "router.top_k"} <= fields
    assert undecided(fields) == [], "does it decide what comes out of a run? say so in run_folder/identity.py"
    assert sorted(NOT_DECIDING.keys() - fields) == [], "no such field any more"


@pytest.mark.parametrize("part", ["run", "sweep", "parallel", "checkpoint", "metrics", "fault"])
def test_a_new_field_is_found(part: str):
    assert undecided({*fields_of(Config), f"{part}.new_field"}) == [f"{part}.new_field"]
    assert undecided({"new_part.field"}) == ["new_part.field"] and decides("new_part.field")


def test_every_reason_is_a_sentence_and_no_field_is_in_both():
    assert all(len(reason.split()) >= 5 for reason in NOT_DECIDING.values())
    assert not set(DECIDING) & NOT_DECIDING.keys()


@pytest.mark.parametrize("field", sorted(flatten(compose_values([])).keys() - {"fault.point", "spike.rewind"}))
def test_the_lists_are_what_is_compared(field: str):
    values = flatten(compose_values([]))
    assert (deciding(values) != deciding({**values, field: "another"})) == (field not in NOT_DECIDING)


def test_what_is_saved_decides_where_a_run_goes_back_to_it():
    values = {**flatten(compose_values([])), "spike.rewind": True}
    for field, other in (("checkpoint.every_steps", 7), ("checkpoint.keep_last", 9), ("metrics.progress", False)):
        assert (deciding(values) != deciding({**values, field: other})) == field.startswith("checkpoint."), field


def test_a_fault_decides_where_it_makes_a_step_sick():
    values = flatten(compose_values([]))
    assert deciding(values) == deciding({**values, "fault.point": "save.renamed"})
    sick = {**values, "fault.point": "train.rows"}
    assert deciding(values) != deciding(sick) != deciding({**sick, "fault.step": 5})


def test_a_run_from_before_warm_starts_is_one_without():
    values = flatten(compose_values([]))
    old = {key: value for key, value in values.items() if key != "checkpoint.warm_start"}
    assert deciding(values) == deciding(old) != deciding({**values, "checkpoint.warm_start": "a"})
