"""Everything that touches Megatron-Core."""

import warnings
from typing import Any

import torch

# Megatron-Core and torch advise every process about CUDA packages, CUDA settings and renamed functions of
# one another. Without CUDA nobody can follow the advice.
if not torch.cuda.is_available():
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")

    # Megatron-Core compiles functions as it is imported, for fusions that only GPUs have: a third of the time to start.
    _compile = torch.compile

    def _compile_what_is_used(model: Any = None, **options: Any) -> Any:
        if getattr(model, "__module__", "").startswith("megatron.core."):
            return model
        return _compile(model, **options)

    torch.compile = _compile_what_is_used
