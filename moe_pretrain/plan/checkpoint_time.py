"""Seconds that a checkpoint takes: those that training waits for, and those of the thread that writes behind it."""

from dataclasses import dataclass

from moe_pretrain.config.schema import Config
from moe_pretrain.plan.local_parameters import LocalParameters


@dataclass(frozen=True)
class Storage:
    """Rates at which state leaves a GPU.

    Attributes:
        host_link: Bytes/s from a GPU to its host's memory.
        disk: Bytes/s that the ranks of a node write together.
        gpus_per_node: GPUs of a node.
    """

    host_link: float = 25e9
    disk: float = 2e9
    gpus_per_node: int = 8


@dataclass(frozen=True)
class CheckpointTime:
    """One checkpoint.

    Attributes:
        rank_bytes: What the rank with most of it saves.
        staged: Seconds until that is in the host's memory, in which training waits.
        written: Seconds until the node with most of it has written its ranks' parts.
    """

    rank_bytes: float
    staged: float
    written: float

    def waiting(self, interval: float, asynchronous: bool) -> float:
        """Seconds that training waits, for a checkpoint every ``interval`` seconds.

        A save begins when the one before is written, so a disk that is slower than the interval holds training up.
        """
        if not asynchronous:
            return self.staged + self.written
        return self.staged + max(0.0, self.written - interval)


def checkpoint_time(config: Config, ranks: int, local: LocalParameters, storage: Storage) -> CheckpointTime:
    """Time of a checkpoint of float32 weights and moments.

    Under ZeRO every rank saves what it owns. Without it the first ranks save all that they hold, since the others hold
    the same: one copy of what is replicated, and one of each expert.

    Args:
        config: A run whose ranks divide.
        ranks: Number of ranks.
        local: Parameters of one of them.
        storage: Rates.
    """
    expert_parallel = config.parallel.expert_parallel_size
    on_a_node = min(ranks, storage.gpus_per_node)
    replicated = 4 * (local.dense + local.kept) + local.moment_bytes
    experts = 4 * local.expert + local.expert_moment_bytes
    if config.engine.zero_stage == 0:
        rank_bytes: float = replicated + experts
        node_bytes: float = replicated + min(on_a_node, expert_parallel) * experts
    else:
        rank_bytes = (replicated + expert_parallel * experts) / ranks
        node_bytes = on_a_node * rank_bytes
    return CheckpointTime(rank_bytes, rank_bytes / storage.host_link, node_bytes / storage.disk)
