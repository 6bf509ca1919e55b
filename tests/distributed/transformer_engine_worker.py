"""Checks models of TransformerEngine's modules under each layout, for tools/check_transformer_engine.py.

There is no GPU. One is pretended while a model or an optimizer is built, and nothing is computed with either.
Rank 0 writes {check: {layout: {variant: what is wrong on any rank}}} and the classes of TransformerEngine that stood.
"""

# ruff: noqa: E402 - a GPU is pretended before Megatron-Core is imported

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

GPU = SimpleNamespace(name="pretended", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30)


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """Within, there seems to be one; memory is where it was."""
    with (
        patch.object(torch.cuda, "is_available", lambda: True),
        patch.object(torch.cuda, "get_device_capability", lambda *_: (GPU.major, GPU.minor)),
        patch.object(torch.cuda, "get_device_properties", lambda *_: GPU),
    ):
        yield


with pretended_gpu():  # without one the backend hides TransformerEngine from Megatron-Core
    import chord_megatron.backend  # noqa: F401

import torch.distributed as dist
import upstream_layers_worker as upstream
from checkpoint_forms_worker import save as save_weights
from conversion_worker import BUCKET_BYTES, differences
from layouts import lay_out
from megatron.core import optimizer
from megatron.core.optimizer import distrib_optimizer
from safetensors.torch import load_file
from torch import Tensor
from transformer_engine.pytorch.optimizers import FusedAdam, fused_adam

from chord_megatron.backend.cpu import _rewrite_constants
from chord_megatron.backend.engine import MegatronEngine
from chord_megatron.backend.groups import ParallelGroups, shut_down_distributed
from chord_megatron.backend.hf_weights import export_hf_weights, load_hf_weights, named_weights
from chord_megatron.backend.megatron_weights import load_megatron_weights
from chord_megatron.backend.model import build_model_chunks
from chord_megatron.backend.optimizer import allocate_adam_state
from chord_megatron.checkpoints import conversion
from chord_megatron.config import ModelConfig, OptimizerConfig, ParallelConfig
from chord_megatron.weights.architecture import ModelArchitecture
from chord_megatron.weights.hf_config import read_architecture
from chord_megatron.weights.mapping import find_mapping, hf_tensors

assert optimizer.Adam is distrib_optimizer.Adam is FusedAdam and distrib_optimizer.USING_TE_OPTIMIZER
Chunks = list[torch.nn.Module]
STEP = 7  # of an optimizer that has taken some
OURS: dict[str, dict[str, Any]] = {"a key for each layer": {"non_homogeneous_layers": True}}
OTHERS: dict[str, dict[str, Any]] = {"stacked layers": {}, "a key for each expert": {"singleton_local_shards": True}}


@dataclass(frozen=True)
class Case:
    """A model under a layout, and where it may write."""

    hf: Path
    dtype: str
    arch: ModelArchitecture
    parallel: ParallelConfig
    groups: ParallelGroups
    work: Path

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(path=str(self.hf), dtype=self.dtype)


def main(questions: dict[str, Any], results: Path) -> None:
    _rewrite_constants(fused_adam)
    found: dict[str, Any] = defaultdict(lambda: defaultdict(dict))
    modules: Counter[str] = Counter()
    for layout, (settings, variants) in questions["layouts"].items():
        parallel, groups = lay_out(settings)
        for variant, checks in variants.items():
            path, dtype = questions["models"][variant]
            for check in checks:
                work = Path(questions["work"]) / "written"
                case = Case(Path(path), dtype, read_architecture(Path(path)), parallel, groups, work)
                found[check][layout][variant] = everywhere(case, CHECKS[check])
            modules += classes(build(case, te=True))
            if groups.rank == 0:  # so far
                results.write_text(json.dumps({"checks": found, "modules": modules}), encoding="utf-8")
    shut_down_distributed()


def everywhere(case: Case, check: Callable[[Case], str]) -> str:
    """What is wrong on any rank; empty if nothing is."""
    if case.groups.rank == 0:
        case.work.mkdir(parents=True)
    dist.barrier()
    try:
        wrong = check(case)
    except Exception as error:
        if dist.get_world_size() > 1:
            raise  # the other ranks may wait in a collective of this case
        traceback.print_exc()  # the next case must not suffer
        wrong = f"{type(error).__name__}: {error}"
    found: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(found, wrong)
    if case.groups.rank == 0:
        shutil.rmtree(case.work)
    return "; ".join(sorted(set(filter(None, found))))


@contextlib.contextmanager
def torch_adam() -> Iterator[None]:
    """Within, Megatron-Core has found no other."""
    with (
        patch.multiple(optimizer, Adam=torch.optim.AdamW, USING_PYTORCH_OPTIMIZER=True),
        patch.multiple(distrib_optimizer, Adam=torch.optim.Adam, HAVE_APEX_OR_TE=False, USING_TE_OPTIMIZER=False),
    ):
        yield


def build(case: Case, *, te: bool) -> Chunks:
    with pretended_gpu() if te else contextlib.nullcontext():
        return build_model_chunks(case.arch, case.model, case.parallel, case.groups)


def classes(chunks: Chunks) -> Counter[str]:
    """How many modules there are of each class of TransformerEngine's, or Megatron-Core's around one."""
    kinds = [type(module) for chunk in chunks for module in chunk.modules()]
    return Counter(
        kind.__name__ for kind in kinds if kind.__name__.startswith("TE") or "transformer_engine" in kind.__module__
    )


def weights(chunks: Chunks, arch: ModelArchitecture) -> dict[str, Tensor]:
    """Copies by the names that local layers have, one for each row of the table."""
    named = list(named_weights(chunks))
    found = {find_mapping(name, arch).local_name: tensor.detach().clone() for name, tensor in named}
    assert len(found) == len(named), "two parameters of one name"
    return found


@torch.no_grad()
def with_nan(chunks: Chunks) -> Chunks:
    """What is not loaded shows."""
    for _, tensor in named_weights(chunks):
        tensor.fill_(float("nan"))
    return chunks


def loaded(case: Case, *, te: bool) -> Chunks:
    chunks = with_nan(build(case, te=te))
    load_hf_weights(chunks, case.hf, case.arch, case.groups)
    return chunks


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> str:
    if ours.keys() != theirs.keys():
        return f"other names: {sorted(ours.keys() ^ theirs.keys())}"
    return ", ".join(k for k, x in ours.items() if x.dtype != theirs[k].dtype or not torch.equal(x, theirs[k]))


def on_first_rank(case: Case, action: Callable[[], Any]) -> Any:
    dist.barrier()
    found = action() if case.groups.rank == 0 else None
    dist.barrier()
    return found


def converted_back(case: Case, source: Path) -> str:
    """What the offline converter makes of a checkpoint, beside the model that it is of; on the first rank."""

    def convert() -> str:
        conversion.megatron_to_hf(source, case.work / "hf", hf_config=case.hf)
        ours, theirs = (load_file(folder / "model.safetensors") for folder in (case.work / "hf", case.hf))
        shutil.rmtree(case.work / "hf")
        return compare(ours, theirs)

    return on_first_rank(case, convert) or ""


def convert(case: Case) -> Path:
    """The model as a checkpoint of the offline converter."""
    directory = case.work / "converted"
    on_first_rank(case, lambda: conversion.hf_to_megatron(case.hf, directory))
    return directory


def check_conversion(case: Case) -> str:
    chunks = loaded(case, te=True)
    if not classes(chunks)["TERowParallelLinear"]:
        return "no module of TransformerEngine"
    exported = list(export_hf_weights(chunks, case.arch, case.groups, BUCKET_BYTES))
    return differences(exported, case.hf, list(hf_tensors(case.arch, getattr(torch, case.dtype))))


def check_checkpoints(case: Case, forms: dict[str, dict[str, Any]]) -> str:
    """Of either kind of layers into the other, and of TransformerEngine's to Hugging Face."""
    wrong = {}
    for te in (True, False):
        source, target = loaded(case, te=te), loaded(case, te=not te)
        expected = weights(target, case.arch)
        for form, metadata in forms.items():
            directory = case.work / f"{form} {te}"
            save_weights(source, directory, metadata)
            load_megatron_weights(with_nan(target), directory, case.arch)
            wrong[f"{form}, from {'TE' if te else 'local'}"] = compare(weights(target, case.arch), expected)
            if te:
                wrong[f"{form}, to Hugging Face"] = converted_back(case, directory)
    return listed(wrong)


def check_converted(case: Case) -> str:
    expected, chunks = weights(loaded(case, te=True), case.arch), with_nan(build(case, te=True))
    load_megatron_weights(chunks, convert(case), case.arch)
    return compare(weights(chunks, case.arch), expected)


def check_upstream(case: Case) -> str:
    """Megatron-LM's own model of TransformerEngine's layers: its checkpoint into ours, ours into it."""
    with pretended_gpu():
        theirs = upstream.build_upstream(case.arch, case.parallel, "transformer_engine")
    upstream.fill(theirs, case.hf, case.arch)
    expected = dict(upstream.tensors(theirs))
    upstream.save(theirs, case.work / "theirs")
    ours = with_nan(build(case, te=True))
    load_megatron_weights(ours, case.work / "theirs", case.arch)
    wrong = {"theirs into ours": compare(dict(named_weights(ours)), expected)}
    wrong["theirs to Hugging Face"] = converted_back(case, case.work / "theirs")
    expected = {name: tensor.clone() for name, tensor in expected.items()}
    upstream.clear(theirs)
    upstream.load(theirs, convert(case))
    wrong["ours into theirs"] = compare(dict(upstream.tensors(theirs)), expected)
    return listed(wrong)


class Run:
    """An engine of TransformerEngine's layers and Adam, or of local layers and torch's."""

    def __init__(self, case: Case, *, te: bool, sharded: bool, **of_optimizer: Any) -> None:
        """sharded: the optimizer's state over data-parallel ranks."""
        self.te = te
        settings = OptimizerConfig(use_distributed_optimizer=sharded, weight_decay=0.1, **of_optimizer)
        with self.adam(), pretended_gpu() if te else contextlib.nullcontext():
            self.engine = MegatronEngine(
                case.model, case.parallel, settings, case.groups, train_iters=9, keep_reference=False
            )
        adams = {type(inner.optimizer).__module__.split(".")[0] for inner in self.inner}
        assert adams == {"transformer_engine" if te else "torch"}, adams

    def adam(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.te else torch_adam()

    @property
    def inner(self) -> list[Any]:
        return self.engine._optimizer.chained_optimizers

    def save(self, directory: Path, state: dict[str, Any]) -> None:
        with self.adam():
            self.engine.save(directory, state)

    def load(self, directory: Path) -> dict[str, Any]:
        with self.adam():
            return self.engine.load(directory)


@torch.no_grad()
def trained(run: Run) -> Run:
    """As if it had taken steps. A parameter gets the same values on every rank that has it."""
    for inner in run.inner:
        adam = inner.optimizer
        inner.init_state_fn(adam, inner.config)
        for group in adam.param_groups:
            if isinstance(adam, FusedAdam):
                group["step"] = STEP
            for parameter in group["params"]:
                state = adam.state[parameter]
                state["exp_avg"].copy_(parameter / 3)
                state["exp_avg_sq"].copy_(parameter**2 / 5)
                if not isinstance(adam, FusedAdam):
                    state["step"] = torch.tensor(float(STEP))
                if inner.config.bf16:
                    parameter.mul_(1 + 2**-12)  # which bfloat16 rounds off
    return run


@torch.no_grad()
def blank(run: Run) -> Run:
    """What is not loaded shows."""
    with_nan(run.engine._chunks)
    for parameter in run.engine._optimizer.get_parameters():
        parameter.fill_(float("nan"))
    return run


def state_of(run: Run) -> dict[str, Tensor]:
    """Copies of this rank's weights, master weights and moments, and its steps."""
    found = {name: tensor.detach().clone() for name, tensor in named_weights(run.engine._chunks)}
    for i, inner in enumerate(run.inner):
        inner.init_state_fn(inner.optimizer, inner.config)  # before the first step: zeros
        for j, group in enumerate(inner.optimizer.param_groups):
            for k, parameter in enumerate(group["params"]):
                state = inner.optimizer.state[parameter]
                found |= {f"{i}.{j}.{k} {key}": state[key].clone() for key in ("exp_avg", "exp_avg_sq")}
                found[f"{i}.{j}.{k} main"] = parameter.detach().clone()
                # TransformerEngine's Adam counts by group, torch's by parameter.
                found[f"{i}.{j} step"] = torch.tensor(int(state.get("step", group.get("step", 0))))
    return found


def settings_of(run: Run) -> list[dict[str, Any]]:
    """What each parameter group says beside its parameters and steps; an Adam reads its own names there."""
    groups = [group for inner in run.inner for group in inner.optimizer.param_groups]
    return [{key: value for key, value in group.items() if key not in ("params", "step")} for group in groups]


def steps_of(state: dict[str, Tensor]) -> set[int]:
    return {int(value) for name, value in state.items() if name.endswith(" step")}


def passed_on(case: Case, run: Run, kinds: list[bool], *, sharded: bool) -> str:
    """What differs in the last of these engines, each of which loads what the one before has saved."""
    expected: dict[str, Tensor] = {}
    for number, te in enumerate(kinds):
        directory = case.work / f"run {number}"
        run.save(directory, {"step": number})
        expected = expected or state_of(run)
        run = blank(Run(case, te=te, sharded=sharded))
        settings = settings_of(run)
        assert run.load(directory) == {"step": number}
        if steps_of(state_of(run)) != steps_of(expected):
            return f"steps {steps_of(state_of(run))} instead of {steps_of(expected)}"
        for ours, theirs in zip(settings, settings_of(run), strict=True):
            if ours != {key: theirs.get(key) for key in ours}:
                return f"settings of parameter groups: {ours} became {theirs}"
    on_first_rank(case, lambda: [shutil.rmtree(folder) for folder in case.work.iterdir()])
    return compare(state_of(run), expected)


def check_resume(case: Case, *, sharded: bool) -> str:
    first = Run(case, te=True, sharded=sharded)
    wrong = {"before the first step": passed_on(case, first, [True], sharded=sharded)}
    wrong["after steps"] = passed_on(case, trained(first), [True], sharded=sharded)
    return listed(wrong)


def check_resume_elsewhere(case: Case, *, sharded: bool) -> str:
    """There and back between a machine with TransformerEngine and one without."""
    wrong = {}
    for te in (True, False):
        first = Run(case, te=te, sharded=sharded)
        name = "TE's, local, TE's" if te else "local, TE's, local"
        wrong[name] = passed_on(case, trained(first), [not te, te], sharded=sharded)
    return listed(wrong)


FEWER_BITS: dict[str, dict[str, str]] = {
    "float32": {},
    "bfloat16": {"exp_avg_dtype": "bfloat16", "exp_avg_sq_dtype": "bfloat16", "main_grads_dtype": "bfloat16"},
    "float16": {"exp_avg_dtype": "float16", "exp_avg_sq_dtype": "float16", "main_params_dtype": "float16"},
}
STATES = ("exp_avg", "exp_avg_sq", "master_param")


@torch.no_grad()
def trained_in_fewer_bits(run: Run) -> Run:
    """As `trained`."""
    allocate_adam_state(run.engine._optimizer)
    for inner in run.inner:
        adam = inner.optimizer
        for group in adam.param_groups:
            group["step"] = STEP
            for parameter in group["params"]:
                values = (parameter.float() / 3, parameter.float() ** 2 / 5, parameter.float() * (1 + 2**-12))
                for name, value in zip(STATES, values):
                    adam.set_scaled_state(parameter, name, value)
    return run


def states_in_float32(run: Run) -> dict[str, Tensor]:
    """Of precision-aware optimizers and of plain ones: master weights, moments and steps."""
    found = {}
    for i, inner in enumerate(run.inner):
        adam, is_aware = inner.optimizer, inner.config.use_precision_aware_optimizer
        for j, group in enumerate(adam.param_groups):
            found[f"{i}.{j} step"] = torch.tensor(int(group["step"]))
            for k, parameter in enumerate(group["params"]):
                for name in STATES:
                    state = parameter if name == "master_param" else adam.state[parameter][name]
                    state = adam.get_unscaled_state(parameter, name) if is_aware else state
                    found[f"{i}.{j}.{k} {name}"] = state.detach().float().clone()
    return found


def check_fewer_bits(case: Case) -> str:
    """Of states that TransformerEngine's Adam keeps in fewer bits: saved, and loaded by such a one and a plain one."""
    wrong = {}
    for name, dtypes in FEWER_BITS.items():
        settings = {"use_precision_aware_optimizer": True, **dtypes}
        run = trained_in_fewer_bits(Run(case, te=True, sharded=True, **settings))
        held = {state["exp_avg"].dtype for inner in run.inner for state in inner.optimizer.state.values()}
        if held != {getattr(torch, dtypes.get("exp_avg_dtype", "float32"))}:
            wrong[f"{name}, dtypes"] = str(held)
        run.save(case.work / name, {})
        for reader, of_reader in ((f"{name}, by its like", settings), (f"{name}, by a plain one", {})):
            other = blank(Run(case, te=True, sharded=True, **of_reader))
            other.load(case.work / name)
            wrong[reader] = compare(states_in_float32(other), states_in_float32(run))
    on_first_rank(case, lambda: [shutil.rmtree(folder) for folder in case.work.iterdir()])
    return listed(wrong)


def listed(wrong: dict[str, str]) -> str:
    return "; ".join(f"{name}: {what}" for name, what in wrong.items() if what)


CHECKS: dict[str, Callable[[Case], str]] = {
    "from Hugging Face and back": check_conversion,
    "from a converted checkpoint": check_converted,
    "checkpoints of either layers": partial(check_checkpoints, forms=OURS),
    "checkpoints of either layers, other forms": partial(check_checkpoints, forms=OTHERS),
    "checkpoints of Megatron-LM's layers": check_upstream,
    "resume": partial(check_resume, sharded=False),
    "resume, sharded optimizer": partial(check_resume, sharded=True),
    "resume, states in fewer bits": check_fewer_bits,
    "resume on the other layers": partial(check_resume_elsewhere, sharded=False),
    "resume on the other layers, sharded optimizer": partial(check_resume_elsewhere, sharded=True),
}


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
