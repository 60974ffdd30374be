"""Micro-batches for one rank. A step's data is a pure function of the step: there is no state.

Position n of the run is one row of the corpus: see ``order``, and ``stream_rows`` for a corpus that is streamed. A step
consumes the next ``global_batch_rows`` positions, each rank a contiguous part of them, cut into micro-batches in order.
So the number of ranks, the micro-batch size and the prefetching thread change nothing, and a run resumes by
naming its next step.
"""

import queue
import threading
from collections.abc import Callable, Generator
from typing import Any, Literal

import numpy as np

from moe_pretrain.data.rows.micro_batch import MicroBatch, build_micro_batches
from moe_pretrain.data.rows.mixture import MixedShards
from moe_pretrain.data.rows.packing import BestFit, Concatenated, Rows
from moe_pretrain.data.rows.permutation import rank_positions
from moe_pretrain.data.rows.positions import Mixed, PositionedRows, Shuffled, SourceUse, WholeRows
from moe_pretrain.data.shards.reader import ShardReader
from moe_pretrain.data.stream.rows import StreamedRows
from moe_pretrain.data.stream.shard_stream import ShardStream
from moe_pretrain.system.cpu import keep_freed_memory
from moe_pretrain.system.threads import start_thread

PackingMethod = Literal["concatenate", "best_fit"]
PACKINGS: dict[PackingMethod, Callable[[ShardReader, int], Rows]] = {"concatenate": Concatenated, "best_fit": BestFit}
_PREFETCHED_STEPS = 2
_ROWS_AT_ONCE = 64  # enough to spread the cost of a numpy call, few enough for the processor's caches


class TrainLoader:
    """Endless training micro-batches of one rank; epochs follow one another.

    Args:
        reader: The training tokens, of one corpus or of several that are mixed, or a stream of them.
        sequence_length: Input positions of a row.
        global_batch_rows: Rows of one step over all ranks.
        micro_batch_rows: Rows of one forward pass on one rank.
        rank: This data-parallel rank.
        world_size: Number of data-parallel ranks.
        seed: Key of the order of rows.
        isolate_documents: See ``packing.build_micro_batch``.
        shuffle: False reads the rows in their own order, for tests and debugging.
        method: How documents are packed into rows: see ``rows``.
        reset_positions: See ``packing.build_micro_batch``.

    Raises:
        ValueError: The corpus is shorter than one row, or the batch does not divide.
    """

    def __init__(
        self,
        reader: ShardReader | MixedShards | ShardStream,
        sequence_length: int,
        global_batch_rows: int,
        micro_batch_rows: int,
        rank: int,
        world_size: int,
        seed: int,
        isolate_documents: bool,
        shuffle: bool = True,
        method: PackingMethod = "concatenate",
        reset_positions: bool | None = None,
    ) -> None:
        rows_per_pass = world_size * micro_batch_rows
        if rows_per_pass < 1 or global_batch_rows < 1 or global_batch_rows % rows_per_pass:
            raise ValueError(
                f"global_batch_rows={global_batch_rows} must be a positive multiple of "
                f"world_size*micro_batch_rows={world_size}*{micro_batch_rows}={rows_per_pass}"
            )
        # A step's arrays are of a size that glibc gives back to the system each time: two thirds of the speed.
        keep_freed_memory()
        self.rows: PositionedRows
        if isinstance(reader, ShardStream):
            if method != "concatenate":
                raise ValueError(f"packing.method={method} must be concatenate when data is streamed")
            self.rows = StreamedRows(reader, sequence_length, seed, shuffle)
        elif isinstance(reader, MixedShards):
            rows = {name: PACKINGS[method](one, sequence_length) for name, one in reader.readers.items()}
            self.rows = WholeRows(Mixed(rows, reader.config.turns(global_batch_rows), seed, shuffle))
        else:
            self.rows = WholeRows(Shuffled(PACKINGS[method](reader, sequence_length), seed, shuffle))
        self.num_rows, self.waste = self.rows.num_rows, self.rows.waste
        self._global_batch_rows = global_batch_rows
        self._micro_batch_rows = micro_batch_rows
        self._rank = rank
        self._world_size = world_size
        self._isolate_documents = isolate_documents
        self._reset_positions = isolate_documents if reset_positions is None else reset_positions

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of one step, in order."""
        own = rank_positions(step, self._global_batch_rows, self._rank, self._world_size)
        positions = np.arange(own.start, own.stop, dtype=np.int64)
        found = self.rows.find(positions)
        chunk = max(1, _ROWS_AT_ONCE // self._micro_batch_rows) * self._micro_batch_rows
        batches: list[MicroBatch] = []
        for first in range(0, len(positions), chunk):
            part = slice(first, first + chunk)
            tokens, starts, used = self.rows.read(found[part])
            batches += build_micro_batches(
                tokens,
                starts,
                positions[part],
                self._isolate_documents,
                self._reset_positions,
                self._micro_batch_rows,
                used,
            )
        return batches

    @property
    def _mixed(self) -> Mixed | None:
        whole = self.rows.positions if isinstance(self.rows, WholeRows) else None
        return whole if isinstance(whole, Mixed) else None

    def source_use(self, step: int) -> dict[str, SourceUse]:
        """Rows that the first ``step`` steps take from each source of a mixture; empty for a single corpus."""
        return self._mixed.use(step * self._global_batch_rows) if self._mixed else {}

    def exhaustion_steps(self) -> dict[str, int]:
        """First step that needs each source of a mixture for the second time; without those that never run out."""
        found = self._mixed.runs_out() if self._mixed else {}
        return {name: at // self._global_batch_rows for name, at in found.items() if at is not None}

    def reach(self, step: int) -> None:
        """Wait until ``micro_batches(step)`` can be read."""
        self.rows.reach(step * self._global_batch_rows, (step + 1) * self._global_batch_rows, lambda: False)

    def state(self, step: int) -> dict[str, Any] | None:
        """State that a checkpoint before ``step`` keeps for ``restore``."""
        return self.rows.cursor(step * self._global_batch_rows)

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on from a checkpoint's state.

        Raises:
            ValueError: It was made with other settings.
        """
        self.rows.restore(state)

    def iterate(self, first_step: int) -> Generator[tuple[int, list[MicroBatch]], None, None]:
        """``(step, micro_batches(step))`` from ``first_step`` on, for ever or to the end of a stream that ends the run.

        When step s is asked for, every rank must have done with the data of step s - 1. One background thread works up
        to two steps ahead. What fails in it is raised here, at the step it failed on; closing the iterator ends the
        thread.
        """
        ready: queue.Queue[tuple[int, list[MicroBatch] | Exception | None]] = queue.Queue(_PREFETCHED_STEPS)
        stop = threading.Event()

        def work() -> None:
            step = first_step
            while not stop.is_set():
                first, last = step * self._global_batch_rows, (step + 1) * self._global_batch_rows
                try:
                    there = self.rows.reach(first, last, stop.is_set)
                    result: list[MicroBatch] | Exception | None = self.micro_batches(step) if there else None
                except Exception as error:
                    result = error
                ready.put((step, result))
                if not isinstance(result, list):
                    return
                step += 1

        thread = start_thread(work, "prefetch")
        try:
            while True:
                step, result = ready.get()
                if isinstance(result, Exception):
                    raise result
                if result is None:
                    return
                self.rows.release(step * self._global_batch_rows)
                yield step, result
        finally:
            stop.set()
            # After stop the thread puts at most one more result; room for it lets it end.
            while not ready.empty():
                ready.get_nowait()
            thread.join()
