"""Streams without processes: a writer that works when it is waited for, and a small corpus of many shards."""

import json

import numpy as np

from moe_pretrain.data import StreamingConfig, TokenizerConfig
from moe_pretrain.data.stream.shard_stream import ShardStream
from moe_pretrain.data.stream.writer import ShardsAhead, StreamJob

TOKENIZER = TokenizerConfig("train", 300, None)


def streaming(**changes):
    options = {"mode": "always", "shard_bytes": 1500, "window_shards": 2, "shards_ahead": 1, "cache_shards": None}
    options |= {"validation_shards": 2, "at_end": "repeat", "retry_seconds": 0.0, "stall_seconds": 60.0}
    return StreamingConfig(**(options | changes))


def write_lines(path, rows, first=0):
    """Numbered documents of different lengths, one of them empty."""
    generator = np.random.default_rng(first)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(first, first + rows):
            text = f"{number} " + "word " * int(generator.integers(0, 30)) if number % 37 != 5 else ""
            file.write(json.dumps({"text": text}) + "\n")


class InlineWriter:
    """Writes one shard each time somebody waits."""

    status = "the writer of a test"

    def __init__(self, folder, corpus, config):
        self.lines, self.most_cached = [], 0
        job = StreamJob(folder, corpus, TOKENIZER, config, 1)
        self.shards = ShardsAhead(job, lambda kind, text: self.lines.append((kind, text)), lambda: None)
        self._folder = folder

    def check(self):
        self.shards.step()
        self.most_cached = max(self.most_cached, len(list((self._folder / "train").glob("*.bin"))))

    def demand(self, kept, last):
        self._replace(kept=kept, last=last)

    def start_from(self, shard, place, num_shards):
        self._replace(base_shard=shard, base_place=place, num_shards=num_shards)

    def close(self):
        pass

    def _replace(self, **changes):
        import dataclasses

        self.shards.demand = dataclasses.replace(self.shards.demand, **changes)


def open_inline(folder, corpus, config, lines=None, is_first=True):
    """A stream and, on the first rank, its writer."""
    writer = InlineWriter(folder, corpus, config) if is_first else None
    stream = ShardStream(folder, corpus, config, writer, (lines if lines is not None else []).append)
    stream.load_tokenizer(TOKENIZER)
    stream.validation(lambda: False)
    return stream, writer
