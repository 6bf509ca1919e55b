"""What differs between the supported releases of Megatron-Core, and what this package does about it.

DIFFERENCES is the whole list. A row can go, with the code that it names, once the oldest supported release is newer
than `until`; a row without it is there to stay until upstream changes again.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import megatron.core
import torch


@dataclass(frozen=True)
class Difference:
    """One thing that only some releases do."""

    what: str
    covered_by: str  # here, below chord_megatron/
    since: str | None = None  # the first release that does it; None: the oldest supported one does
    until: str | None = None  # the last; None: the newest supported one does


DIFFERENCES = (
    Difference(
        "moe_utils asks whether te_general_gemm is None, and without TransformerEngine it is not defined",
        "backend/releases.py, tell_that_transformer_engine_is_missing",
        until="0.16",
    ),
    Difference(
        "multi_latent_attention takes TransformerEngine for installed when its wrappers can be imported",
        "backend/releases.py, tell_that_transformer_engine_is_missing",
        until="0.16",
    ),
    Difference(
        "what is no tensor of a checkpoint is in the file common.pt",
        "checkpoints/common_state.py, common_state_bytes",
        until="0.18",
    ),
    Difference(
        "what is no tensor of a checkpoint is a bytes entry, common_state, which Megatron-Core lets torch unpickle",
        "checkpoints/common_state.py, common_state_bytes; backend/sharded_state.py, load_sharded",
        since="0.19",
    ),
    Difference(
        "a process-wide flag, and no longer the context argument, says whether a forward pass is inference",
        "backend/releases.py, inference_flag",
        since="0.18",
    ),
    Difference(
        "latent attention builds other norms than its spec names, and none without a query LoRA on local layers",
        "backend/releases.py, latent_norms_of_spec",
        since="0.19",
    ),
    Difference(
        "an optimizer finds its saved parameter groups by their learning rates, too, which a user may change",
        "backend/releases.py, configure_saved_groups",
        since="0.19",
    ),
    Difference(
        "_ParamAndGradBucketGroup.start_grad_sync asks for the current CUDA stream on any device",
        "backend/cpu.py, _replace_cuda_functions",
        since="0.19",
    ),
    Difference(
        "a router's top k is in no order where there is no gradient",
        "backend/router_replay.py, choose",
        since="0.18",
    ),
    Difference(
        "CheckpointWithoutOutput compiles a C++ extension in the first backward pass",
        "backend/releases.py, recompute_in_plain_torch",
        since="0.19",
    ),
    Difference(
        "`megatron.core.__version__` ends with the commit of whichever Git repository the package lies in",
        "backend/releases.py, installed",
        since="0.18",
    ),
)


def installed() -> str:
    """The release at hand, also where it is not installed but on the path."""
    return megatron.core.__version__.partition("+")[0]


def tell_that_transformer_engine_is_missing() -> None:
    """Two modules of 0.16 misjudge it, also where there is CUDA."""
    from megatron.core.extensions import transformer_engine
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    multi_latent_attention.HAVE_TE = transformer_engine.HAVE_TE


def recompute_in_plain_torch() -> None:
    """CheckpointWithoutOutput, behind some of TransformerConfig.recompute_modules, needs nothing that is not there.

    It takes its own default fp8=False for FP8, which asks TransformerEngine (all releases), and shares storages by an
    extension that it compiles, where a machine may have no compiler: here by a copy, as up to 0.18.
    """
    from megatron.core.tensor_parallel import random

    if not random.HAVE_TE:
        initialize = random.CheckpointWithoutOutput.__init__
        random.CheckpointWithoutOutput.__init__ = lambda checkpoint, fp8=None: initialize(checkpoint, fp8 or None)
    if hasattr(random, "_get_share_storage"):
        random._get_share_storage = lambda: _copy_storage  # noqa: SLF001 - has no public name


@torch.no_grad()
def _copy_storage(target: torch.Tensor, source: torch.Tensor) -> None:
    """Below the tensors, so that autograd counts no change and views see it."""
    target.untyped_storage().resize_(source.untyped_storage().nbytes())
    target.untyped_storage().copy_(source.untyped_storage())


def inference_flag() -> contextlib.AbstractContextManager[None]:
    """Tells the modules inside that this is inference, where they ask a flag."""
    try:
        from megatron.core.inference.utils import InferenceMode
    except ImportError:
        return contextlib.nullcontext()
    return InferenceMode.active()


def latent_norms_of_spec(submodules: Any) -> dict[str, Any]:
    """What MLASelfAttention._resolve_qk_norm_config returns: here the modules that the spec names, as up to 0.18.

    QKNormConfigResolver (mla_qk_norm_config.py) fuses a norm into the query projection where there is no query LoRA:
    a second one behind the input norm, which the models of Hugging Face do not have.
    """
    names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
    return {name: getattr(submodules, name) for name in names}


def configure_saved_groups(state: dict[str, Any], settings: dict[str, Any]) -> None:
    """Give every saved parameter group of an optimizer's state these settings, which are the same in all of them.

    0.19 refuses to load groups with others than the optimizer has (optimizer.py, param_group_identifier_keys).
    """
    for key, value in state.items():
        if key == "param_groups":
            for group in value:
                group.update({name: setting for name, setting in settings.items() if name in group})
        elif isinstance(value, dict):
            configure_saved_groups(value, settings)
