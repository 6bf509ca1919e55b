"""Time the fused vocabulary projection beside its peers, forward and backward, and measure memory and errors.

    python tools/bench_log_probs.py [--tokens 512 2048] [--repeats 5] [--output benchmarks/results/log_probs_cpu.json]

On an NVIDIA GPU (torch >= 2.11 and Triton are all it needs) the sizes are those of Qwen3-8B under TP 1, 2, 4 and 8,
one shard's compute without communication; on a CPU those of Qwen2.5-0.5B. Peers are measured where they can be
imported. All run in one process in turns; medians. Memory on a CPU: the high-water mark of each case in a process
of its own. Extra memory includes the gradients; on a GPU dW goes into an existing float32 main gradient. Sizes that
the output file holds already stay in it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_environment import hardware, versions
from bench_log_probs_methods import METHODS, Inputs, make_inputs
from torch import Tensor

PACKAGES = ("torch", "triton", "megatron-core", "liger-kernel", "cut-cross-entropy", "trl")
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


@dataclass(frozen=True)
class Case:
    """One method on one size; valid: the share of rows that count."""

    method: str
    tokens: int
    hidden_size: int
    vocab_size: int
    device: str
    valid: float = 1.0
    entropy: bool = True
    tile: tuple[int, int] | None = None

    def inputs(self, dtype: torch.dtype | None = None) -> Inputs:
        dtype = dtype or (torch.bfloat16 if self.device == "cuda" else torch.float32)
        return make_inputs(self.tokens, self.hidden_size, self.vocab_size, self.valid, self.device, dtype)

    @property
    def multiplications(self) -> int:
        """Matrix multiplications of forward and backward."""
        return METHODS[self.method].multiplications

    @property
    def needed_flops(self) -> float:
        return 3 * 2.0 * self.tokens * self.valid * self.hidden_size * self.vocab_size

    @property
    def done_flops(self) -> float:
        share = self.valid if METHODS[self.method].skips_rows else 1.0
        return self.multiplications * 2.0 * self.tokens * share * self.hidden_size * self.vocab_size


# --- time -----------------------------------------------------------------------------------------------------------


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def time_once(case: Case, inputs: Inputs) -> tuple[float, float]:
    """Seconds of the forward and of the backward pass."""
    inputs.clear_gradients()
    synchronize(case.device)
    start = time.perf_counter()
    backward = METHODS[case.method].run(inputs, case.entropy, case.tile)
    synchronize(case.device)
    middle = time.perf_counter()
    backward()
    synchronize(case.device)
    return middle - start, time.perf_counter() - middle


def time_cases(cases: list[Case], repeats: int, warm_up: int) -> list[dict[str, Any]]:
    """Medians of each case, taken in turns; a case that fails is reported with its error."""
    inputs = {case.valid: case.inputs() for case in cases}
    times: dict[Case, list[tuple[float, float]]] = {case: [] for case in cases}
    errors: dict[Case, str] = {}
    for repeat in range(-warm_up, repeats):
        for case in cases:
            if case in errors:
                continue
            try:
                seconds = time_once(case, inputs[case.valid])
            except Exception as error:  # a peer's failure is a result, too
                errors[case] = f"{type(error).__name__}: {str(error)[:300]}"
                continue
            if repeat >= 0:
                times[case].append(seconds)
    return [
        {**asdict(case), **(summary(case, times[case]) if times[case] else {"error": errors[case]})} for case in cases
    ]


def summary(case: Case, times: list[tuple[float, float]]) -> dict[str, Any]:
    totals = [sum(pair) for pair in times]
    return {
        "forward_ms": 1e3 * statistics.median(pair[0] for pair in times),
        "backward_ms": 1e3 * statistics.median(pair[1] for pair in times),
        "total_ms": 1e3 * statistics.median(totals),
        "fastest_ms": 1e3 * min(totals),
        "slowest_ms": 1e3 * max(totals),
        "needed_tflop": case.needed_flops / 1e12,
        "done_tflop": case.done_flops / 1e12,
    }


def add_ratios(results: list[dict[str, Any]]) -> None:
    """Times and memory over those of `plain` at the same size with all rows and the same outputs."""
    for result in results:
        size = ("tokens", "hidden_size", "vocab_size", "entropy")
        for other in results:
            if other["method"] == "plain" and other["valid"] == 1.0 and all(other[k] == result[k] for k in size):
                for key in ("total_ms", "extra_bytes"):
                    if result.get(key) and other.get(key):
                        result[f"{key}_over_plain"] = result[key] / other[key]
            if other["method"] == "matrix multiplications" and all(other[k] == result[k] for k in size[:3]):
                for key in ("forward_ms", "backward_ms"):
                    if result.get(key) and other.get(key) and other is not result:
                        result[f"{key}_share_of_bare"] = other[key] / result[key]


# --- memory ---------------------------------------------------------------------------------------------------------


def extra_bytes(case: Case) -> int:
    """Peak memory of forward and backward beyond that of the inputs, gradients included."""
    if case.device == "cuda":
        inputs = case.inputs()
        inputs.clear_gradients()  # makes the main gradient
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        time_once(case, inputs)
        return torch.cuda.max_memory_allocated() - before
    command = [sys.executable, __file__, "--measure-memory", json.dumps(asdict(case))]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure_resident_memory(case: Case) -> int:
    """In this process, by the high-water mark of its resident memory, set back after the inputs are made."""
    time_once(replace(case, tokens=8), replace(case, tokens=8).inputs())  # libraries and thread pools are there
    inputs = case.inputs()
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    time_once(case, inputs)
    return status_bytes("VmHWM") - before


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def with_memory(result: dict[str, Any], case: Case) -> dict[str, Any]:
    if "error" in result:
        return result
    try:
        return {**result, "extra_bytes": extra_bytes(case)}
    except (subprocess.CalledProcessError, torch.OutOfMemoryError) as error:
        return {**result, "memory_error": str(error)[:300]}


# --- errors ---------------------------------------------------------------------------------------------------------


def errors_against_float64(case: Case) -> dict[str, Any]:
    """Root-mean-square errors of the outputs and gradients of each method, against the plain path in float64."""
    names = ("log_probs", "entropy", "hidden_gradient", "weight_gradient")
    inputs = case.inputs()
    exact = values(replace(case, method="plain"), inputs.to(torch.float64))
    found: dict[str, Any] = {}
    for name, method in METHODS.items():
        if method.bare or method.summed or not method.available():
            continue
        try:
            own = values(replace(case, method=name, entropy=method.has_entropy), inputs)
        except Exception as error:  # as above
            found[name] = f"{type(error).__name__}: {str(error)[:300]}"
            continue
        true = (
            exact
            if method.has_entropy
            else values(replace(case, method="plain", entropy=False), inputs.to(torch.float64))
        )
        found[name] = {
            what: (ours.double() - theirs).square().mean().sqrt().item()
            for what, ours, theirs in zip(names, own, true)
            if ours is not None and theirs is not None
        }
    return found


def values(case: Case, inputs: Inputs) -> tuple[Tensor | None, ...]:
    inputs.clear_gradients()
    backward = METHODS[case.method].run(inputs, case.entropy, case.tile)
    outputs = backward.args[0]
    backward()
    weight_gradient = inputs.main_gradient()
    return (*outputs, inputs.hidden.grad, weight_gradient)


# --- the whole ------------------------------------------------------------------------------------------------------


def make_cases(tokens: int, hidden_size: int, vocab_size: int, device: str, tile: tuple[int, int] | None) -> list[Case]:
    case = partial(Case, tokens=tokens, hidden_size=hidden_size, vocab_size=vocab_size, device=device)
    available = [name for name, method in METHODS.items() if method.available()]
    cases = [case(name) for name in available if METHODS[name].has_entropy]
    cases += [
        case(name, entropy=False) for name in available if not METHODS[name].has_entropy and not METHODS[name].bare
    ]
    cases += [case(name, entropy=False) for name in ("plain", "fused")]
    cases += [case(name, valid=share) for share in (0.6, 0.3) for name in ("plain", "fused")]
    cases += [case(name) for name in available if METHODS[name].bare]
    return [replace(case, tile=tile) if case.method.startswith("fused") else case for case in cases]


def main() -> None:
    arguments = parse()
    if arguments.measure_memory:
        print(measure_resident_memory(Case(**json.loads(arguments.measure_memory))))
        return
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    device = arguments.device
    settings = {"repeats": arguments.repeats, "threads": torch.get_num_threads()}
    report = {"hardware": hardware(), "versions": versions(PACKAGES), "settings": settings}
    results = earlier_results(arguments, report)
    small = Case("plain", 256, arguments.hidden, min(arguments.vocab), device, tile=arguments.tile)
    report["rms_errors_256_tokens"] = errors_against_float64(small)
    for vocab_size in arguments.vocab:
        for tokens in arguments.tokens:
            cases = make_cases(tokens, arguments.hidden, vocab_size, device, arguments.tile)
            cases = [case for case in cases if case.method in arguments.methods]
            timed = time_cases(cases, arguments.repeats, arguments.warm_up)
            results += [with_memory(result, case) for result, case in zip(timed, cases)]
            add_ratios(results)
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps({**report, "results": results}, indent=1) + "\n", encoding="utf-8")
            show(results[-len(cases) :])


def earlier_results(arguments: argparse.Namespace, report: dict[str, Any]) -> list[dict[str, Any]]:
    """What the output file holds of other sizes, measured under the same conditions."""
    if not arguments.output.exists():
        return []
    earlier = json.loads(arguments.output.read_text(encoding="utf-8"))
    if any(earlier[key] != value for key, value in report.items()):
        return []
    return [
        result
        for result in earlier["results"]
        if result["tokens"] not in arguments.tokens or result["vocab_size"] not in arguments.vocab
    ]


def show(results: list[dict[str, Any]]) -> None:
    for result in results:
        what = f"T {result['tokens']:6} v {result['vocab_size']:6} {result['method']:28} valid {result['valid']:.1f}"
        what += "" if result["entropy"] else " no entropy"
        if "error" in result:
            print(f"{what}: {result['error']}", flush=True)
            continue
        numbers = f"{result['forward_ms']:9.1f} + {result['backward_ms']:9.1f} = {result['total_ms']:9.1f} ms"
        shares = (f"{result[key]:.3f} {key}" for key in result if "_over_" in key or "_share_" in key)
        print(
            f"{what}: {numbers}, {result.get('extra_bytes', 0) / 2**20:7.0f} MiB extra; {', '.join(shares)}", flush=True
        )


def parse() -> argparse.Namespace:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = device == "cuda"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 32768] if on_gpu else [512, 2048])
    parser.add_argument("--hidden", type=int, default=4096 if on_gpu else 896)
    vocab = [151936, 75968, 37984, 18992] if on_gpu else [151936]
    parser.add_argument("--vocab", type=int, nargs="+", default=vocab, help="columns of one shard")
    parser.add_argument("--repeats", type=int, default=30 if on_gpu else 5)
    parser.add_argument("--warm-up", type=int, default=3 if on_gpu else 0)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="the default is all")
    parser.add_argument("--tile", type=int, nargs=2, default=None, metavar=("TOKENS", "COLUMNS"))
    parser.add_argument("--threads", type=int, default=None, help="of the CPU; the default is torch's")
    parser.add_argument("--output", type=Path, default=RESULTS / f"log_probs_{'gpu' if on_gpu else 'cpu'}.json")
    parser.add_argument("--measure-memory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.tile = arguments.tile and tuple(arguments.tile)
    return arguments


if __name__ == "__main__":
    main()
