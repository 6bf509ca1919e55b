"""Everything that touches Megatron-Core."""

import warnings

import torch

# Megatron-Core and torch advise every process about CUDA packages, CUDA settings and renamed functions of
# one another. Without CUDA nobody can follow the advice.
if not torch.cuda.is_available():
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
