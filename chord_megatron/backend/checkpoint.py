"""Megatron distributed checkpoints of model, optimizer, scheduler and random state, whole or not there at all.

A checkpoint directory holds Megatron-Core's `.distcp` files, `common.pt`, `state.json` (cursors, step,
scheduler: plain values) and one `rng_RANK.safetensors` per rank. It can be loaded under another layout.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes

from chord_megatron.backend import releases
from chord_megatron.backend.checkpoint_writer import Copies, begin_sharded
from chord_megatron.backend.groups import ParallelGroups
from chord_megatron.backend.model import unwrap
from chord_megatron.backend.optimizer import (
    TORCH_ADAMS,
    allocate_adam_state,
    drop_hybrid_settings,
    plain_optimizers,
)
from chord_megatron.backend.sharded_state import READ_ERRORS, load_sharded, set_weights
from chord_megatron.checkpoints.common_state import read_common_state
from chord_megatron.checkpoints.metadata import cause_of, refuse_unsafe
from chord_megatron.system.atomic import failed_writes_named, partial_path, replaced_directory
from chord_megatron.system.background import Background
from chord_megatron.system.errors import UserError
from chord_megatron.weights.architecture import ModelArchitecture
from chord_megatron.weights.model_files import copy_model_files

_METADATA = {
    # The only formats whose optimizer state can change TP and PP when it is loaded.
    "distrib_optim_sharding_type": "fully_reshardable",
    # Without it every data-parallel rank gathers the whole fp32 state of its shard.
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "chained_optim_avoid_prefix": True,
    # A key for each layer, as converted checkpoints have; Megatron-Core will drop the other form.
    "non_homogeneous_layers": True,
}

# What the configuration says again on resuming, so that a user can change it; Megatron-Core keeps it in the
# optimizer's parameter groups, and its scheduler believes those.
_CONFIGURED = ("lr", "max_lr", "min_lr", "betas", "eps", "fused", "foreach")


@contextlib.contextmanager
def saving(
    directory: Path,
    chunks: list[torch.nn.Module],
    optimizer: Any,
    scheduler: Any,
    state: dict[str, Any],
    groups: ParallelGroups,
    *,
    model_dir: Path,
    arch: ModelArchitecture,
    copies: Copies | None = None,
) -> Iterator[Background]:
    """Write a checkpoint beside `directory`; at the end of the context it is complete, and renamed into place.

    Collective at both ends. Within, a thread writes: the weights may change meanwhile if there are `copies`, memory of
    the host that is kept for the next time. The configuration and tokenizer of `model_dir` come along, so that it can
    be converted by itself. Raises UserError, on all ranks, where the tensors cannot be written.
    """
    with failed_writes_named(directory), _folder_of_all_ranks(directory, groups) as folder:
        allocate_adam_state(optimizer)
        tensors = begin_sharded(_sharded_state(chunks, optimizer, is_loading=False), folder, copies)
        (folder / _rng_file(groups)).write_bytes(safetensors_bytes(_rng_state()))
        if groups.rank == 0:
            document = {"state": state, "scheduler": scheduler.state_dict(), "megatron_core": releases.installed()}
            (folder / "state.json").write_text(json.dumps(document, indent=2), encoding="utf-8")
            copy_model_files([model_dir], folder, arch)
        writing = Background(tensors.write)
        with writing.running():
            yield writing
            error = writing.wait()
        tensors.finish(error)


def load(
    directory: Path, chunks: list[torch.nn.Module], optimizer: Any, scheduler: Any, groups: ParallelGroups
) -> dict[str, Any]:
    """Read what `saving` wrote into the model, the optimizer and the scheduler; returns `state`. Collective."""
    refuse_unsafe(directory)
    remedy = f"name an earlier one in {directory.parent}/latest"
    configured = [dict(group) for group in optimizer.param_groups]
    allocate_adam_state(optimizer)
    sharded_state = _sharded_state(chunks, optimizer, is_loading=True)
    with _failed_reads_named(directory, remedy):
        document = _read_document(directory / "state.json")
        rng_state = _read_rng(directory / _rng_file(groups))
        loaded = load_sharded(sharded_state, directory, _with_optimizer(read_common_state(directory, remedy)))
    for name, chunk in _named_chunks(chunks):
        set_weights(unwrap(chunk), loaded[name])
    _translate_steps(loaded["optimizer"], by_parameter=_counts_by_parameter(optimizer))
    settings_of_all = {key: configured[0][key] for key in _CONFIGURED if key in configured[0]}
    releases.configure_saved_groups(loaded["optimizer"], settings_of_all)
    with absent_states_kept(optimizer):
        optimizer.load_state_dict(loaded["optimizer"])
    _unshare_steps(optimizer)
    for group, settings in zip(optimizer.param_groups, configured, strict=True):
        group.update({key: settings[key] for key in _CONFIGURED if key in settings})
        # The groups are those that were saved, in which another Adam has not said what only this one reads.
        group.update({key: value for key, value in settings.items() if key not in group and key != "step"})
    with _failed_reads_named(directory, remedy):
        _load_scheduler(scheduler, document["scheduler"])
    if rng_state:
        _restore_rng(rng_state)
    return document["state"]


@contextlib.contextmanager
def _failed_reads_named(directory: Path, remedy: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (*READ_ERRORS, SafetensorError) as error:
        raise UserError(
            f"the checkpoint {directory}{_written_by(directory)} cannot be read ({cause_of(error)}); {remedy}"
        ) from error


def _read_document(path: Path) -> dict[str, Any]:
    """What `saving` wrote to state.json. Raises OSError and ValueError."""
    document = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(document, dict) or not all(isinstance(document.get(k), dict) for k in ("state", "scheduler")):
        raise ValueError(f"{path.name} is damaged: it lacks what a run writes there")
    return document


def _with_optimizer(common_state: dict[str, Any]) -> dict[str, Any]:
    """The same. Raises ValueError where it has nothing of an optimizer."""
    if not isinstance(common_state.get("optimizer"), dict):
        raise ValueError("its common state is damaged: it lacks the optimizer's settings")
    return common_state


def _load_scheduler(scheduler: Any, state: dict[str, Any]) -> None:
    try:
        scheduler.load_state_dict(state)
    except (KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"state.json is damaged: the scheduler's {error}") from error


@contextlib.contextmanager
def _folder_of_all_ranks(directory: Path, groups: ParallelGroups) -> Iterator[Path]:
    """Where all ranks write; rank 0 makes it and moves it to `directory`. Collective."""
    is_first = groups.rank == 0
    with replaced_directory(directory) if is_first else contextlib.nullcontext(partial_path(directory)) as folder:
        dist.barrier()
        yield folder
        dist.barrier()
    dist.barrier()


def _written_by(directory: Path) -> str:
    """Which release wrote a checkpoint, where it is another one than reads it."""
    try:
        release = json.loads((directory / "state.json").read_text(encoding="utf-8")).get("megatron_core")
    except (OSError, ValueError, AttributeError, RecursionError):
        return ""
    if release in (None, releases.installed()):
        return ""
    return f" of megatron-core {release} (this is {releases.installed()})"


def _named_chunks(chunks: list[torch.nn.Module]) -> list[tuple[str, torch.nn.Module]]:
    """Megatron-Core's optimizers know the chunks of an interleaved pipeline by these names."""
    if len(chunks) == 1:
        return [("model", chunks[0])]
    return [(f"model{index}", chunk) for index, chunk in enumerate(chunks)]


def _sharded_state(chunks: list[torch.nn.Module], optimizer: Any, *, is_loading: bool) -> dict[str, Any]:
    metadata = dict(_METADATA)  # Megatron-Core notes the layout's groups in it
    state: dict[str, Any] = {
        name: unwrap(chunk).sharded_state_dict(metadata=metadata) for name, chunk in _named_chunks(chunks)
    }
    models = state["model"] if len(chunks) == 1 else dict(state)
    state["optimizer"] = optimizer.sharded_state_dict(models, is_loading=is_loading, metadata=metadata)
    drop_hybrid_settings(state["optimizer"])
    # Objects (as against tensors) are pickled and unpickled without checks; nothing here needs one.
    _, state = extract_matching_values(state, lambda value: isinstance(value, ShardedObject))
    return state


@contextlib.contextmanager
def absent_states_kept(optimizer: Any) -> Iterator[None]:
    """Within, loading leaves the states of a parameter as they are that a checkpoint does not hold.

    DistributedOptimizer._set_main_param_and_optimizer_states expects all of them, and torch Adam's `step` is absent.
    """
    distributed = [inner for inner in optimizer.chained_optimizers if isinstance(inner, DistributedOptimizer)]
    for inner in distributed:
        inner._set_main_param_and_optimizer_states = partial(_set_present_states, inner)  # noqa: SLF001 - no public name
    try:
        yield
    finally:
        for inner in distributed:
            del inner._set_main_param_and_optimizer_states  # noqa: SLF001 - what was set above


def _set_present_states(
    inner: DistributedOptimizer, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]
) -> None:
    present = inner._get_main_param_and_optimizer_states(model_param)  # noqa: SLF001 - no public name
    set_all = DistributedOptimizer._set_main_param_and_optimizer_states  # noqa: SLF001 - no public name
    set_all(inner, model_param, {**present, **tensors})


def _counts_by_parameter(optimizer: Any) -> bool:
    """Torch's Adam does; TransformerEngine's and Apex's count by group."""
    plain = (each for inner in optimizer.chained_optimizers for each in plain_optimizers(inner))
    return any(isinstance(each, TORCH_ADAMS) for each in plain)


def _translate_steps(state: dict[str, Any], *, by_parameter: bool) -> None:
    """Write the steps of a saved optimizer as the Adam that loads it reads them, whichever Adam has saved them.

    It would otherwise count from 0, or from 1, and correct the bias of its moments once more. The optimizers that are
    not distributed leave a step of zero out, too, which torch's Adam then misses (FP32Optimizer.sharded_state_dict).
    All of a chain have stepped together; one has saved no step where the first stage holds no parameter of it.
    """
    chained = _saved_optimizers(state)
    count = max(map(_pop_step, chained), default=0)
    for saved in chained:
        if by_parameter and "state" in saved:
            saved["state"]["common_step"] = torch.tensor(float(count))
        else:  # DistributedOptimizer's are with the groups, whichever Adam it has
            for group in saved["param_groups"]:
                group["step"] = count


def _saved_optimizers(state: dict[str, Any]) -> list[dict[str, Any]]:
    if "param_groups" in state:
        return [state]
    return [saved for value in state.values() if isinstance(value, dict) for saved in _saved_optimizers(value)]


def _pop_step(saved: dict[str, Any]) -> int:
    by_groups = max([int(group.pop("step", None) or 0) for group in saved["param_groups"]], default=0)
    return int(saved.get("state", {}).pop("common_step", by_groups))


def _unshare_steps(optimizer: Any) -> None:
    """DistributedOptimizer.load_state_dict gives all parameters one `step`, which Adam then increments for each."""
    for inner in optimizer.chained_optimizers:
        for state in inner.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()


def _rng_state() -> dict[str, torch.Tensor]:
    tracked = {f"tracker.{name}": state.clone() for name, state in get_cuda_rng_tracker().get_states().items()}
    states = {"cpu": torch.get_rng_state(), **tracked}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _rng_file(groups: ParallelGroups) -> str:
    return f"rng_{groups.rank:05d}.safetensors"


def _read_rng(path: Path) -> dict[str, torch.Tensor]:
    """A rank's random state; nothing where the saving job did not have the rank, which keeps its seeded one.

    Raises SafetensorError and ValueError.
    """
    if not path.exists():
        return {}
    states = load_file(path)
    now = torch.get_rng_state()
    if "cpu" not in states or states["cpu"].shape != now.shape or any(s.dtype != now.dtype for s in states.values()):
        raise ValueError(f"{path.name} is damaged: it holds no random state")
    return states


def _restore_rng(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states.pop("cpu"))
    if "cuda" in states:
        torch.cuda.set_rng_state(states.pop("cuda"))
    get_cuda_rng_tracker().set_states({name.removeprefix("tracker."): s for name, s in states.items()})
