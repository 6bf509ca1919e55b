"""Seconds and memory that a process takes until it has the data of a run: a large data set, read by several at once.

    python tools/bench_data.py --directory /data/bench --rows 1000000 --processes 8

Each process is one of gloo's, and does what a rank does before its model is built: prompts and expert answers are read
and tokenized, checked and fingerprinted; then the ranks meet. Three ways, side by side:

- each for itself: every process reads and tokenizes all rows into its own memory, as small data sets are read;
- together: all make the samples once, into files that each maps (`data/stored.py`), the folder being empty;
- again: the same with the files there, as at the second start.

Memory is what a process has for itself alone (`USS`) more than before: a file that all processes map is in memory once.
The peak is the most that was resident, imports and mapped files included. The tokenizer is a byte-level BPE of 8,000
tokens trained on the rows, which are made up of words, by a seed. A million rows take the first way hours and more
memory than most machines have: --rows-alone bounds them, and the figures for all are in proportion.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import socket
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist
import torch.multiprocessing as mp
from bench_environment import hardware, versions
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from chord_megatron.config import ChordConfig, DataConfig
from chord_megatron.data import files, load
from chord_megatron.data.fingerprint import fingerprint
from chord_megatron.data.samples import columns_of, holds_token_beyond, lengths_of

VOCAB_SIZE, WORDS, PROMPT_WORDS, ANSWER_WORDS = 8000, 20_000, 60, 120
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MARKERS = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="where the files go; must not exist")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--rows-alone", type=int, default=20_000, help="at most, for the first way")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/data.json"))
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True)
    try:
        result = measure(arguments.directory, arguments.rows, min(arguments.rows, arguments.rows_alone), arguments)
    finally:
        shutil.rmtree(arguments.directory)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


def measure(directory: Path, rows: int, rows_alone: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """All that goes into the JSON."""
    processes = arguments.processes
    write_rows(directory / "rows.jsonl", rows)
    write_rows(directory / "fewer.jsonl", rows_alone)
    write_tokenizer(directory / "tokenizer", directory / "fewer.jsonl")
    alone = read_by_all(directory, "fewer.jsonl", processes, together=False)
    together = read_by_all(directory, "rows.jsonl", processes, together=True)
    again = read_by_all(directory, "rows.jsonl", processes, together=True)
    assert together["fingerprints"] == again["fingerprints"]
    cache = directory / "datasets" / "chord_megatron"
    return {
        "what": "the data of a run, until every process has them: seconds of the slowest, bytes of its own memory",
        "rows": rows,
        "processes": processes,
        "tokens": together.pop("tokens"),
        "bytes_of_the_file": (directory / "rows.jsonl").stat().st_size,
        "bytes_of_the_cache": sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()),
        "each_for_itself": {
            "rows": rows_alone,
            **alone,
            "seconds_for_all_rows": round(alone["seconds"] * rows / rows_alone, 1),
            "bytes_for_all_rows": round(alone["bytes_mean"] * rows / rows_alone),
        },
        "together": together,
        "again": again,
        "hardware": hardware(),
        "versions": versions(("torch", "transformers", "tokenizers", "datasets", "pyarrow")),
    }


def read_by_all(directory: Path, name: str, processes: int, *, together: bool) -> dict[str, Any]:
    """What `read` found in each process."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    answers = mp.get_context("spawn").SimpleQueue()
    context = mp.spawn(read, (processes, port, directory, name, together, answers), nprocs=processes, join=False)
    found = [answers.get() for _ in range(processes)]
    while not context.join():
        pass
    fingerprints = {tuple(each.pop("fingerprints")) for each in found}
    assert len(fingerprints) == 1, "the processes have read different data"
    return {
        "seconds": round(max(each["seconds"] for each in found), 2),
        "bytes_mean": round(statistics.fmean(each["bytes"] for each in found)),
        "bytes_peak": max(each["peak"] for each in found),
        "tokens": found[0]["tokens"],
        "fingerprints": fingerprints.pop(),
    }


def read(rank: int, processes: int, port: int, directory: Path, name: str, together: bool, answers: Any) -> None:
    """One process: what `training/run.py` does with the data before anything is built."""
    import datasets

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", RAYON_NUM_THREADS="1")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    datasets.config.HF_DATASETS_CACHE = directory / "datasets"
    if not together:
        load.FEWEST_ROWS = files.LARGE_FILE = 2**62
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory / "tokenizer")
    dist.init_process_group("gloo", rank=rank, world_size=processes)
    process = psutil.Process()
    dist.barrier()
    before, start = process.memory_full_info().uss, time.monotonic()
    source = str(directory / name)
    data = load.load_run_data(
        DataConfig(dataset=source), ChordConfig(chord_sft_dataset=source), tokenizer, expert_max_length=4096
    )
    assert not any(holds_token_beyond(samples, len(tokenizer)) for samples in (data.prompts, data.experts))
    assert columns_of(data.prompts) == ["answer", "source"]
    found = [fingerprint(data.prompts), fingerprint(data.experts)]
    tokens = sum(length for samples in (data.prompts, data.experts) for _, length in lengths_of(samples))
    dist.barrier()
    seconds = time.monotonic() - start
    peak = peak_of_own_memory()
    answers.put(
        {
            "seconds": seconds,
            "bytes": process.memory_full_info().uss - before,
            "peak": peak,
            "tokens": tokens,
            "fingerprints": found,
        }
    )
    dist.barrier()
    dist.destroy_process_group()


def peak_of_own_memory() -> int:
    """The most that was resident at any time, imports and mapped files included."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def write_rows(path: Path, rows: int) -> None:
    """Questions and worked answers of made-up words, the same for the same number."""
    letters = random.Random(0)
    words = ["".join(letters.choices("etaoinshrdlu", k=letters.randint(2, 9))) for _ in range(WORDS)]
    chance = random.Random(1)
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            prompt = " ".join(chance.choices(words, k=chance.randint(PROMPT_WORDS // 2, PROMPT_WORDS * 3 // 2)))
            answer = " ".join(chance.choices(words, k=chance.randint(ANSWER_WORDS // 2, ANSWER_WORDS * 3 // 2)))
            file.write(json.dumps({"prompt": prompt, "answer": f"{answer} #### {number}", "source": "made up"}) + "\n")


def texts(path: Path) -> Iterator[str]:
    """Some of a file, to train a tokenizer on."""
    with path.open(encoding="utf-8") as file:
        for _, line in zip(range(2000), file):
            yield json.loads(line)["answer"]


def write_tokenizer(folder: Path, rows: Path) -> None:
    """Byte-level BPE with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=MARKERS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(rows), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, eos_token="<|end|>").save_pretrained(
        folder
    )


if __name__ == "__main__":
    main()
