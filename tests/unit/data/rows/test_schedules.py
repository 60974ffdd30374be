"""10,000 random schedules of one run, without a process: nothing missing, nothing repeated, the order identical.

A schedule is what may change while a run goes on: at every resume the number of ranks, the micro-batch size and with it
the accumulation, and where the prefetching thread stood. The pure functions alone decide (defects C36 to C39).
"""

import numpy as np
import pytest
from helpers.corpora import write_shards

from moe_pretrain.data.loader import TrainLoader
from moe_pretrain.data.rows.micro_batch import wrap_to_int64
from moe_pretrain.data.rows.permutation import RowPermutation, rank_positions

SCHEDULES = 10_000


def divisors(number):
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def consumed(global_batch_rows, first_step, num_steps, world_size):
    """Positions in the order in which the ranks of one launch read them: step by step, rank by rank."""
    return [
        position
        for step in range(first_step, first_step + num_steps)
        for rank in range(world_size)
        for position in rank_positions(step, global_batch_rows, rank, world_size)
    ]


def random_schedule(generator):
    num_rows = int(generator.integers(1, 60))
    global_batch_rows = int(generator.choice([1, 2, 3, 4, 6, 8, 12, 24]))
    segments = [int(generator.integers(1, 4)) for _ in range(int(generator.integers(1, 5)))]
    first_step = int(generator.choice([0, 0, 1, 10**9]))
    return num_rows, global_batch_rows, segments, first_step, int(generator.integers(0, 2**31))


def run_schedule(generator, order_of):
    """Positions read over all launches, the rows there, and one micro-batch that was asked for by itself."""
    num_rows, global_batch_rows, segments, step, seed = random_schedule(generator)
    positions, micro_batches = [], []
    for num_steps in segments:
        # A resume: another number of ranks, another micro-batch size.
        world_size = int(generator.choice(divisors(global_batch_rows)))
        size = int(generator.choice(divisors(global_batch_rows // world_size)))
        own = consumed(global_batch_rows, step, num_steps, world_size)
        first = int(generator.integers(0, len(own) // size)) * size
        micro_batches.append(slice(len(positions) + first, len(positions) + first + size))
        positions += own
        step += num_steps
    positions = np.array(positions)
    cut = micro_batches[int(generator.integers(0, len(micro_batches)))]
    # Two objects, for a resume is another process.
    rows, own_rows = order_of(num_rows, seed).rows(positions), order_of(num_rows, seed).rows(positions[cut])
    return num_rows, (step - sum(segments)) * global_batch_rows, positions, rows, rows[cut], own_rows


@pytest.mark.slow
def test_ten_thousand_schedules_read_the_same_rows_in_the_same_order():
    generator = np.random.default_rng(0)
    whole_epochs = 0
    for _ in range(SCHEDULES):
        num_rows, first, positions, rows, part, own_rows = run_schedule(
            generator, lambda num_rows, seed: RowPermutation(num_rows, seed, True)
        )
        assert np.array_equal(positions, np.arange(first, first + len(positions)))
        assert np.array_equal(part, own_rows)
        # Every epoch that lies inside is a permutation: no row missing, none twice.
        start = -first % num_rows
        epochs = (len(rows) - start) // num_rows
        if epochs > 0:
            whole = rows[start : start + epochs * num_rows].reshape(epochs, num_rows)
            assert np.array_equal(np.sort(whole, axis=1), np.tile(np.arange(num_rows), (epochs, 1)))
            whole_epochs += epochs
    assert whole_epochs > 1000


def test_the_check_sees_an_order_that_depends_on_the_micro_batch():
    """A shuffle of what is at hand, as a buffer does, fails the property within a few schedules."""

    class Buffered(RowPermutation):
        def rows(self, positions):
            rows = super().rows(positions)
            return np.random.default_rng(self.seed).permutation(rows)

    generator = np.random.default_rng(0)
    equal = []
    for _ in range(50):
        *_, part, own_rows = run_schedule(generator, lambda rows, seed: Buffered(rows, seed, True))
        equal.append(np.array_equal(part, own_rows))
    assert not all(equal)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    generator = np.random.default_rng(0)
    texts = [generator.integers(10, 1000, size=generator.integers(0, 30)).tolist() for _ in range(60)]
    return write_shards(tmp_path_factory.mktemp("shards"), texts, tokens_per_shard=200)


def test_two_hundred_schedules_of_loaders_have_the_same_tokens_and_hash(reader):
    generator = np.random.default_rng(1)
    rows = 12
    for _ in range(200):
        steps = int(generator.integers(1, 8))
        first = int(generator.integers(0, 30))
        seed = int(generator.integers(0, 100))
        whole = [
            batch
            for step in range(first, first + steps)
            for batch in TrainLoader(reader, 7, rows, rows, 0, 1, seed, True).micro_batches(step)
        ]
        tokens, total = [], 0
        for step in range(first, first + steps):
            world_size = int(generator.choice([1, 2, 3, 4]))
            micro_batch_rows = int(generator.choice(divisors(rows // world_size)))
            for rank in range(world_size):
                loader = TrainLoader(reader, 7, rows, micro_batch_rows, rank, world_size, seed, True)
                for batch in loader.micro_batches(step):
                    tokens += batch.input_ids.tolist()
                    total = wrap_to_int64(total + batch.token_hash)
        assert tokens == [row for batch in whole for row in batch.input_ids.tolist()]
        assert total == wrap_to_int64(sum(batch.token_hash for batch in whole))
