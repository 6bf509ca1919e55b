"""Checks everything but a forward pass on TransformerEngine's real modules, on a machine without a GPU.

    python3.12 tools/check_transformer_engine.py --make-environment DIRECTORY   # needs nvcc 13; 15 CPU minutes
    DIRECTORY/bin/python tools/check_transformer_engine.py [--output FILE.json]

The first call makes an environment: torch, this package, and TransformerEngine, whose part for torch is compiled. The
second builds the tiny models of tests/tiny_families.py of its modules, in 1, 2 and 4 gloo processes that pretend a
GPU while they build, and checks what passes between them, Hugging Face's files, checkpoints and Megatron-Core's local
layers (tests/distributed/transformer_engine_worker.py). Exit code 1 where something differs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORKER = ROOT / "tests" / "distributed" / "transformer_engine_worker.py"
LIMIT_SECONDS = 3600.0
TORCH, TRANSFORMER_ENGINE = "2.13.0", "2.20.2"  # PyPI's torch for CUDA 13
BUILD_PACKAGES = ("pybind11", "ninja", "wheel", "setuptools", "onnxscript", "onnx", "einops")
PACKAGES = ("torch", "megatron-core", "transformer-engine", "transformer-engine-torch", "transformers", "numpy")
HEADS, DTYPES = ("tied", "untied"), ("float32", "bfloat16")

FORWARD_PASS_ONLY = (
    "attention backends for packed (thd) sequences (FlashAttention, cuDNN's, unfused): which is chosen, its numbers",
    "norms fused into the projection after them: their eps and rounding, and the router's and head's input",
    "grouped matrix products of experts, and the order of tokens that they are given",
    "latent attention with keys and values of different sizes",
    "sampling: SDPA over the KV cache in TransformerEngine's attention module",
    "TransformerEngine's own recomputation, its random states, dropout",
    "gradients: fused accumulation into the float32 sums, sums over TP under sequence parallelism, overlap over DP",
    "FusedAdam.step: its kernel and rounding; here moments are set by hand and only stored, saved and loaded",
    "the FP8 states that modules write as _extra_state; none is written or read here",
    "NCCL, memory, speed",
)


# layout -> (processes, settings as of tests/tiny_families.py)
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "TP 1": (1, ()),
    "TP 2 + SP": (2, ("TP_2",)),
    "PP 2": (2, ("PP_2",)),
    "PP 2 x VPP 2": (2, ("PP_2", "VPP_2")),
    "EP 2": (2, ("EP_2",)),
    "TP 2 x EP 2": (4, ("TP_2", "EP_2")),  # and DP 2
}
CONVERSION = ("from Hugging Face and back", "from a converted checkpoint", "checkpoints of either layers")
FORMS = "checkpoints of either layers, other forms"
UPSTREAM = "checkpoints of Megatron-LM's layers"
RESUME = ("resume", "resume, sharded optimizer")
FEWER_BITS = "resume, states in fewer bits"
RESUME_ELSEWHERE = ("resume on the other layers", "resume on the other layers, sharded optimizer")


def make_environment(directory: Path) -> None:
    """All that the check needs, from PyPI's packages and a local nvcc."""
    if sys.version_info[:2] != (3, 12):
        sys.exit("run --make-environment with Python 3.12: megatron-core's newest release and the build are for it")
    cuda = cuda_home()
    python = directory / "bin" / "python"

    def pip(*arguments: str | Path, **env: str) -> None:
        command = [python, "-m", "pip", "install", "--disable-pip-version-check", *arguments]
        subprocess.run(command, check=True, env={**os.environ, **env})

    subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    pip(f"torch=={TORCH}")
    pip("--constraint", ROOT / "constraints.txt", "--editable", ROOT)
    pip(*BUILD_PACKAGES)
    te = f"=={TRANSFORMER_ENGINE}"
    pip("--no-deps", f"transformer-engine{te}", f"transformer-engine-cu13{te}")
    pip("--no-deps", "--no-build-isolation", f"transformer-engine-torch{te}", **build_settings(python, cuda))


def cuda_home() -> Path:
    """The toolkit that holds nvcc and its headers."""
    nvcc = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME"), Path(nvcc).resolve().parents[1] if nvcc else None, "/usr/local/cuda"]
    for place in map(Path, filter(None, places)):
        if (place / "bin" / "nvcc").is_file() and (place / "include" / "cuda_runtime.h").is_file():
            return place
    sys.exit("there is no nvcc: install NVIDIA's CUDA toolkit 13.0, and set CUDA_HOME")


def build_settings(python: Path, cuda: Path) -> dict[str, str]:
    """Where the compiler finds what the CUDA packages beside torch brought."""
    code = "import nvidia; print(list(nvidia.__path__)[0])"
    found = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    nvidia = Path(found)
    return {
        "CUDA_HOME": str(cuda),
        "CPATH": ":".join(str(nvidia / name / "include") for name in ("cudnn", "nccl", "cu13")),
        "LIBRARY_PATH": ":".join(str(nvidia / name / "lib") for name in ("cu13", "cudnn")),
        "MAX_JOBS": os.environ.get("MAX_JOBS", "1"),
    }


def checks_of(layout: str, variant: str, with_experts: tuple[str, ...]) -> list[str]:
    """Which checks a model has under a layout: what passes weights on, each of them; the slow ones, some."""
    name, head, dtype = variant.split()
    if "EP" in layout and not variant.startswith(with_experts):
        return []
    checks, alone = [*CONVERSION], layout == "TP 1"
    if (head, dtype) == ("untied", "float32"):
        checks.append(FORMS)
    # Megatron-LM's DeepSeek-V3 without query LoRA has another norm since 0.19 (releases.py, latent_norms_of_spec).
    if alone and dtype == "float32" and name != "deepseek_v3-plain":
        checks.append(UPSTREAM)
    if head == "untied" and (alone or dtype == "bfloat16"):
        checks += RESUME
        checks += [FEWER_BITS] * (dtype == "bfloat16")
        checks += RESUME_ELSEWHERE if dtype == "bfloat16" and layout in ("TP 1", "TP 2 x EP 2") else ()
    return checks


def check(work: Path, names: list[str]) -> dict[str, Any]:
    """What the worker found, under all layouts."""
    import tiny_families

    variants = [f"{name} {head} {dtype}" for name in names for head in HEADS for dtype in DTYPES]
    models = {}
    for variant in variants:
        name, head, dtype = variant.split()
        models[variant] = (str(work / variant), dtype)
        tiny_families.write_model(work / variant, name, tied=head == "tied", dtype=dtype)
    checks: dict[str, dict[str, Any]] = {}
    modules: Counter[str] = Counter()
    for processes in sorted({processes for processes, _ in LAYOUTS.values()}):
        layouts = {}
        for layout, (count, parts) in LAYOUTS.items():
            if count == processes:
                settings: dict[str, Any] = {}
                for part in parts:
                    settings |= getattr(tiny_families, part)
                wanted = {v: checks_of(layout, v, tiny_families.WITH_EXPERTS) for v in variants}
                layouts[layout] = (settings, {variant: listed for variant, listed in wanted.items() if listed})
        questions, results = work / f"questions{processes}.json", work / f"results{processes}.json"
        questions.write_text(json.dumps({"models": models, "layouts": layouts, "work": str(work)}), encoding="utf-8")
        launch(work, [str(questions), str(results)], processes)
        found = json.loads(results.read_text(encoding="utf-8"))
        modules += found["modules"]
        for name, by_layout in found["checks"].items():
            checks.setdefault(name, {}).update(by_layout)
    return {"checks": checks, "modules": dict(sorted(modules.items()))}


def launch(work: Path, arguments: list[str], processes: int) -> None:
    """Run the worker in so many processes, which speak over the loopback device."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    folders = [ROOT, ROOT / "tests", WORKER.parent, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        "LD_LIBRARY_PATH": libraries(),
        "PYTHONPATH": ":".join(map(str, folders)),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "TMPDIR": str(work),
    }
    options = {"capture_output": True, "text": True, "env": os.environ | environment, "timeout": LIMIT_SECONDS}
    done = subprocess.run([*command, WORKER, *arguments], **options)
    if done.returncode:
        sys.exit(f"{processes} processes ended with {done.returncode}:\n{done.stdout[-4000:]}{done.stderr[-8000:]}")


def counted(found: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, Any]]:
    """layout -> how many cases, and what was wrong with those that failed."""
    return {
        layout: {"cases": len(cases), "failed": {name: what for name, what in cases.items() if what}}
        for layout, cases in found.items()
    }


def table(checks: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each check, a column for each layout: right ones of all."""
    rows = [["", *LAYOUTS]]
    for name, layouts in checks.items():
        cells = [layouts.get(layout) for layout in LAYOUTS]
        rows.append([name, *(f"{c['cases'] - len(c['failed'])}/{c['cases']}" if c else "" for c in cells)])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def libraries() -> str:
    """LD_LIBRARY_PATH of what the CUDA packages brought, which TransformerEngine loads by name."""
    spec = importlib.util.find_spec("nvidia")
    found = [
        lib for folder in (spec.submodule_search_locations or () if spec else ()) for lib in Path(folder).glob("*/lib")
    ]
    return ":".join([*map(str, sorted(found)), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make-environment", type=Path, metavar="DIRECTORY", help="make it, and end")
    parser.add_argument("--models", nargs="+", help="names in tests/tiny_families.py; without it, all of them")
    parser.add_argument("--output", type=Path, help="a JSON file; by default only the table is printed")
    arguments = parser.parse_args()
    if arguments.make_environment:
        make_environment(arguments.make_environment.resolve())
        return 0
    if importlib.util.find_spec("transformer_engine") is None:
        sys.exit("TransformerEngine is not installed: --make-environment DIRECTORY makes an environment that has it")
    sys.path.insert(0, str(ROOT / "tests"))
    from bench_environment import hardware, versions
    from tiny_families import MODELS

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        found = check(Path(work), arguments.models or list(MODELS))
    checks = {name: counted(layouts) for name, layouts in found["checks"].items()}
    failed = {
        f"{name}, {layout}, {variant}": what
        for name, layouts in checks.items()
        for layout, cases in layouts.items()
        for variant, what in cases["failed"].items()
    }
    print(table(checks), *(f"{case}: {what}" for case, what in failed.items()), sep="\n")
    print("Only a forward pass could show:", *FORWARD_PASS_ONLY, sep="\n- ")
    if arguments.output:
        document = {
            "what": "models of TransformerEngine's modules without a GPU; nothing was computed with them",
            "seconds": round(time.monotonic() - started),
            "cases": sum(cases["cases"] for layouts in checks.values() for cases in layouts.values()),
            "failed": len(failed),
            "checks": checks,
            "modules": found["modules"],
            "only_a_forward_pass_could_show": FORWARD_PASS_ONLY,
            "hardware": hardware(),
            "versions": versions(PACKAGES),
        }
        arguments.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
