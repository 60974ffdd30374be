"""Speed of the data path, as ratios of things measured side by side in one run.

    python scripts/bench/bench_data.py [--seconds 2] [--prepare-megabytes 64] [--workers N] [--train-steps 20]

Loader: one core, shuffled rows of 2,048 tokens from shards, as int64 tensors, in processor seconds.
Tokenising: ``prepare_corpus`` with N processes against the tokenizer library alone in N processes, in elapsed seconds.
Waiting: the share of the step time in which ``train model=tiny`` waited for its data, the first step left out.
"""

import argparse
import itertools
import multiprocessing
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from moe_pretrain.config.load import load
from moe_pretrain.data import (
    MixedShards,
    MixtureConfig,
    ShardReader,
    ShardWriter,
    TokenizerConfig,
    make_manifest,
    prepare_corpus,
    write_manifest,
)
from moe_pretrain.data.shards.reader import Origin
from moe_pretrain.data.tokenizer.load import load_tokenizer_file
from moe_pretrain.run_folder.metrics_file import read_rows
from moe_pretrain.system.cpu import keep_freed_memory

SEQUENCE, ROWS, MEAN_DOCUMENT, VOCAB = 2048, 64, 500, 50257
VALIDATION = 0.1


def write_shards(folder: Path, tokens: int) -> ShardReader:
    generator = np.random.default_rng(0)
    infos, counts = [], np.zeros(VOCAB, dtype=np.int64)
    for number in range(2):
        writer = ShardWriter(folder, number, VOCAB, 0)
        while writer.num_tokens < tokens // 2:
            writer.add(generator.integers(1, VOCAB, size=int(generator.exponential(MEAN_DOCUMENT)) + 1), 10)
        infos.append(writer.close())
        counts += writer.token_counts
    manifest = make_manifest(folder, infos, counts, 0, "benchmark", Origin("benchmark", None, None))
    write_manifest(folder, manifest, counts)
    return ShardReader(folder)


def tokens_per_second(step: Callable[[int], object], seconds: float) -> float:
    """Best of five rounds; processor time, for the machine may be shared."""
    best, number = 0.0, 0
    for _ in range(5):
        started, first = time.process_time(), number
        while time.process_time() - started < seconds / 5:
            step(number)
            number += 1
        best = max(best, (number - first) * ROWS * SEQUENCE / (time.process_time() - started))
    return best


def bench_loader(reader: ShardReader, seconds: float) -> None:
    import torch

    from moe_pretrain.data import TrainLoader

    torch.set_num_threads(1)
    keep_freed_memory()  # for the plain read as well

    mapped = [
        np.asarray(np.memmap(reader.folder / f"{shard.name}.bin", dtype="<u2", mode="r"))
        for shard in reader.manifest.shards
    ]

    def plain(step: int) -> None:
        starts = np.random.default_rng(step).integers(0, min(map(len, mapped)) - SEQUENCE - 1, size=ROWS)
        for start in starts.tolist():
            torch.from_numpy(mapped[step % len(mapped)][start : start + SEQUENCE + 1].astype(np.int64))

    def loader(isolate: bool = True, shards: ShardReader | MixedShards = reader, **options: Any) -> TrainLoader:
        return TrainLoader(shards, SEQUENCE, ROWS, ROWS // 8, 0, 1, 0, isolate, **options)

    with_masks, without = loader(), loader(False)
    corpus = load([]).data  # only its name is used
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    mixture = MixtureConfig("mixture", dict.fromkeys(weights, corpus), weights, (), "repeat")
    mixed = loader(shards=MixedShards(dict.fromkeys(weights, reader), mixture))
    roof = tokens_per_second(plain, seconds)
    print(f"plain shuffled memmap read to int64      {roof / 1e6:8.1f} M tokens/s   1.00")
    for words, one in (
        ("without document masks", without),
        ("with document masks   ", with_masks),
        ("with masks, 3 sources ", mixed),
        ("with masks, best fit  ", loader(method="best_fit")),
    ):
        speed = tokens_per_second(one.micro_batches, seconds)
        print(f"our loader {words}        {speed / 1e6:8.1f} M tokens/s   {speed / roof:.2f}")
    batches = with_masks.iterate(0)
    speed = tokens_per_second(lambda step: next(batches), seconds)
    batches.close()
    print(f"our loader with masks, prefetch thread   {speed / 1e6:8.1f} M tokens/s   {speed / roof:.2f}")
    for position in (0, 10**12):
        times = []
        for _ in range(20):
            started = time.perf_counter()
            loader().micro_batches(position // ROWS)
            times.append(time.perf_counter() - started)
        print(f"first step from position {position:.0e}: {min(times) * 1e3:.2f} ms (step of {ROWS} rows)")


def _library_alone(work: tuple[str, list[str]]) -> tuple[float, float]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import tokenizers

    path, texts = work
    model = tokenizers.Tokenizer.from_file(path)
    started = time.perf_counter()
    for first in range(0, len(texts), 64):
        model.encode_batch_fast(texts[first : first + 64], add_special_tokens=False)
    return started, time.perf_counter()


def corpus_words(folder: Path) -> list[str]:
    """Overrides that read the texts of ``folder``."""
    fraction = f"data.validation_fraction={VALIDATION}"
    return ["data=files", f"data.paths=['{folder}/*.txt']", fraction, "data.invalid_utf8=replace"]


def bench_tokenising(folder: Path, megabytes: int, workers: int) -> None:
    text, characters = [], 0
    for path in itertools.chain(
        *(sorted(Path(sysconfig.get_path(name)).rglob("*.py")) for name in ("stdlib", "purelib"))
    ):
        text.append(path.read_bytes().decode(errors="ignore"))
        characters += len(text[-1])
        if characters > megabytes * 1e6:
            break
    for number, one in enumerate(text):
        (folder / f"{number:05d}.txt").write_text(one)
    config = load(corpus_words(folder)).data
    tokenizer = TokenizerConfig("train", 8192, None)
    first = prepare_corpus(config, tokenizer, folder / "cache", None, workers, None)
    file = folder / "tokenizer.json"
    file.write_bytes((first.train.folder.parent / "tokenizer.json").read_bytes())
    tokens = sum(reader.num_tokens for reader in (first.train, first.validation))
    load_tokenizer_file(file)

    shares = [text[index::workers] for index in range(workers)]
    alone, ours = [], []
    for attempt in range(3):
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            spans = pool.map(_library_alone, [(str(file), share) for share in shares], chunksize=1)
        alone.append(max(end for _, end in spans) - min(start for start, _ in spans))
        started = time.perf_counter()
        pretrained = TokenizerConfig("pretrained", 0, str(file))
        prepare_corpus(config, pretrained, folder / f"cache{attempt}", None, workers, None)
        ours.append(time.perf_counter() - started)
    print(f"tokenizer library alone, {workers} processes     {tokens / min(alone) / 1e6:8.2f} M tokens/s   1.00")
    print(
        f"prepare, {workers} processes, start included     {tokens / min(ours) / 1e6:8.2f} M tokens/s   "
        f"{min(alone) / min(ours):.2f}"
    )


def bench_waiting(folder: Path, steps: int) -> None:
    """Train on what ``bench_tokenising`` has left in ``folder``."""
    overrides = [
        "model=tiny", "model.vocab_size=8192", *corpus_words(folder), "tokenizer=pretrained",
        f"tokenizer.path={folder}/tokenizer.json", f"run.cache_dir={folder}/cache0", f"run.output_dir={folder}/runs",
        "run.name=waiting", "metrics.wandb=off", "metrics.log_every_steps=1", "evaluation.max_rows=8",
        f"budget.tokens={steps * 8192}", "batch.global_batch_tokens=8192", "schedule.warmup_steps=1",
    ]  # fmt: skip
    command = [sys.executable, "-m", "moe_pretrain", "train", *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    rows = [row for row in read_rows(folder / "runs" / "waiting" / "metrics.jsonl") if row["kind"] == "train"][1:]
    waited = [row["train/data_wait_share"] * row["train/step_seconds"] for row in rows]
    seconds = [row["train/step_seconds"] for row in rows]
    print(
        f"training waits for data: {sum(waited) / sum(seconds):.3%} of {len(rows)} steps of {np.mean(seconds):.2f} s, "
        f"at most {max(waited) * 1e3:.2f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="processor time for each loader figure")
    parser.add_argument("--tokens", type=int, default=32_000_000, help="size of the corpus that the loader reads")
    parser.add_argument("--prepare-megabytes", type=int, default=64)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--train-steps", type=int, default=20, help="steps of the run whose waiting is measured")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        (folder := Path(temporary) / "text").mkdir()
        bench_tokenising(folder, options.prepare_megabytes, options.workers)
        bench_waiting(folder, options.train_steps)
        bench_loader(write_shards(Path(temporary) / "shards", options.tokens), options.seconds)


if __name__ == "__main__":
    main()
