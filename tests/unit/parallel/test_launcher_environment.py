"""A launcher's variables and the loopback: what is wrong with them is one line, at once."""

import errno
import socket

import pytest

from moe_pretrain.parallel.launcher import run_workers
from moe_pretrain.parallel.rendezvous import launched_rank, launched_world_size


@pytest.mark.parametrize(
    ("rank", "world_size", "expected"),
    [("", "", (None, 0)), (" ", "2", (None, 0)), ("1", "", (None, 1)), ("1", "2", (2, 1))],
)
def test_empty_variables_are_no_variables(monkeypatch, rank, world_size, expected):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world_size)
    assert (launched_world_size(), launched_rank()) == expected


def test_a_variable_that_is_no_number_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "$SLURM_PROCID")
    with pytest.raises(ValueError, match=r"^RANK=\$SLURM_PROCID in the environment must be a whole number"):
        launched_world_size()


def test_no_loopback_is_one_line_at_once(monkeypatch):
    def unreachable(*arguments, **options):
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    with pytest.raises(
        ValueError, match=r"^parallel.processes=2: .*127.0.0.1.*Network is unreachable.*ip link set lo up"
    ):
        run_workers(["train"], 2)
