"""What bench_log_probs.py measures: inputs like those of a trained model, and the ways to get log-probs from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from chord_megatron.ops import linear_log_probs, vocab_parallel_log_probs

Outputs = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Inputs:
    """hidden [T, H] and weight [V, H] with gradients; per token the target, whether it counts, g and g_H."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    valid: Tensor
    gradients: Tensor

    def clear_gradients(self) -> None:
        self.hidden.grad = self.weight.grad = None
        if self.weight.is_cuda and self.weight.dtype == torch.bfloat16:
            # As Megatron-Core's DistributedDataParallel does: for the method that knows of it.
            if not hasattr(self.weight, "main_grad"):
                self.weight.main_grad = torch.zeros_like(self.weight, dtype=torch.float32)
            self.weight.grad_added_to_main_grad = False
            self.weight.main_grad.zero_()

    def main_gradient(self) -> Tensor | None:
        if getattr(self.weight, "grad_added_to_main_grad", False):
            return self.weight.main_grad
        return self.weight.grad

    def to(self, dtype: torch.dtype) -> Inputs:
        hidden, weight = (x.detach().to(dtype).requires_grad_() for x in (self.hidden, self.weight))
        return replace(self, hidden=hidden, weight=weight)


def make_inputs(
    tokens: int, hidden_size: int, vocab_size: int, valid: float, device: str, dtype: torch.dtype
) -> Inputs:
    """Hidden states as after a final norm: channels of unlike size, a few much larger, and aligned with the target.

    The target's logit is 4 to 20 above the others' mean, so that rows reach from near-uniform to near-certain.
    """
    generator = torch.Generator(device).manual_seed(17)
    random = partial(torch.randn, generator=generator, device=device)
    weight = 0.02 * random(vocab_size, hidden_size)
    channels = (0.5 * random(hidden_size)).exp()
    channels[:: hidden_size // 4] *= 10
    targets = torch.randint(0, vocab_size, (tokens,), generator=generator, device=device)
    chosen = weight[targets]
    height = 4 + 16 * torch.rand(tokens, 1, generator=generator, device=device)
    hidden = random(tokens, hidden_size) * channels + height * chosen / chosen.square().sum(1, keepdim=True)
    counts = torch.arange(tokens, device=device) * valid % 1.0 + valid >= 1.0  # spread evenly
    leaves = (x.to(dtype).requires_grad_() for x in (hidden, weight))
    return Inputs(*leaves, targets, counts, random(2, tokens))


def _plain(inputs: Inputs, entropy: bool, tile: Any) -> Outputs:
    logits = functional.linear(inputs.hidden, inputs.weight)
    log_probs = torch.log_softmax(logits, dim=1, dtype=torch.promote_types(logits.dtype, torch.float32))
    chosen = log_probs.gather(1, inputs.targets[:, None]).squeeze(1) * inputs.valid
    return chosen, -(log_probs.exp() * log_probs).sum(1) * inputs.valid if entropy else None


def _vocab_parallel(inputs: Inputs, entropy: bool, tile: Any) -> Outputs:
    logits = functional.linear(inputs.hidden, inputs.weight)
    temperatures = torch.ones(len(logits), device=logits.device)
    outputs = vocab_parallel_log_probs(logits, inputs.targets, temperatures, vocab_size=logits.shape[1])
    return outputs[0] * inputs.valid, outputs[1] * inputs.valid


def _fused(inputs: Inputs, entropy: bool, tile: tuple[int, int] | None, **options: Any) -> Outputs:
    valid = None if inputs.valid.all() else inputs.valid
    return linear_log_probs(
        inputs.hidden, inputs.weight, inputs.targets, valid=valid, compute_entropy=entropy, tile=tile, **options
    )


def _megatron(inputs: Inputs, entropy: bool, tile: Any) -> Outputs:
    from chord_megatron.backend.groups import initialize_distributed
    from chord_megatron.config import ParallelConfig

    initialize_distributed(ParallelConfig(), seed=0)
    loss = import_module("megatron.core.tensor_parallel").vocab_parallel_cross_entropy
    logits = functional.linear(inputs.hidden, inputs.weight).unsqueeze(1)
    return -loss(logits.float(), inputs.targets[:, None]).squeeze(1) * inputs.valid, None


def _torch_chunked(inputs: Inputs, entropy: bool, tile: Any) -> Outputs:
    """Makes its gradients in the forward pass, for a sum with known weights: here all 1."""
    loss = functional.linear_cross_entropy(
        inputs.hidden,
        inputs.weight,
        inputs.targets,
        reduction="sum",
        options=torch.nn.LinearCrossEntropyOptions(),
    )
    return -loss[None], None


def _liger(inputs: Inputs, entropy: bool, tile: Any) -> Outputs:
    """Makes its gradients in the forward pass, as above."""
    loss = import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return -loss(inputs.weight, inputs.hidden, inputs.targets)[None], None


def _cut_cross_entropy(inputs: Inputs, entropy: bool, tile: Any) -> Outputs:
    loss = import_module("cut_cross_entropy").linear_cross_entropy
    return -loss(inputs.hidden, inputs.weight, inputs.targets, reduction="none"), None


def _trl(inputs: Inputs, entropy: bool, tile: Any) -> Outputs:
    """An internal of TRL 1.16, whose place and arguments change: an error is reported where they do not fit."""
    function = import_module("trl.trainer.utils")._ChunkedLogProbFunction
    arguments = (None, inputs.targets, 1.0, 32768, None, 1.0, ("entropy",))  # as _get_per_token_logps passes them
    log_probs, values, *_ = function.apply(inputs.hidden, inputs.weight, *arguments)
    return log_probs, values


def _bare(inputs: Inputs, entropy: bool, tile: Any) -> Outputs:
    """The ceiling: the logits' multiplication; its backward is the three of a backward pass with recompute."""
    with torch.no_grad():
        return inputs.hidden @ inputs.weight.t(), None


def _bare_backward(inputs: Inputs, outputs: Outputs) -> None:
    with torch.no_grad():
        torch.mm(inputs.hidden, inputs.weight.t(), out=outputs[0])
        outputs[0] @ inputs.weight
        outputs[0].t() @ inputs.hidden


def _backward(outputs: Outputs, gradients: Tensor) -> None:
    present = [output for output in outputs if output is not None]
    given = [g[: len(output)].to(output.dtype) for g, output in zip(gradients, present)]
    torch.autograd.backward(present, given)


@dataclass(frozen=True)
class Method:
    forward: Callable[[Inputs, bool, tuple[int, int] | None], Outputs]
    multiplications: int  # of [T, H] x [H, V] size, forward and backward
    has_entropy: bool = False
    skips_rows: bool = False
    needs: str | None = None  # a package
    on_cpu: bool = True
    summed: bool = False  # a single number comes out, and an upstream gradient of 1 goes in
    bare: bool = False

    def available(self) -> bool:
        return (self.needs is None or find_spec(self.needs) is not None) and (self.on_cpu or torch.cuda.is_available())

    def run(self, inputs: Inputs, entropy: bool, tile: tuple[int, int] | None) -> partial[None]:
        """The forward pass; returns the backward pass, its outputs as first argument."""
        outputs = self.forward(inputs, entropy, tile)
        return partial(_bare_backward, inputs, outputs) if self.bare else partial(_backward, outputs, inputs.gradients)


METHODS = {
    "plain": Method(_plain, 3, has_entropy=True),
    "vocab_parallel_log_probs": Method(_vocab_parallel, 3, has_entropy=True),
    "fused": Method(_fused, 4, has_entropy=True, skips_rows=True),
    "fused, logits saved": Method(partial(_fused, save_logits_bytes=2**62), 3, has_entropy=True, skips_rows=True),
    "fused, torch kernels": Method(
        partial(_fused, implementation="torch"), 4, has_entropy=True, skips_rows=True, on_cpu=False
    ),
    "TRL chunked": Method(_trl, 4, has_entropy=True, needs="trl"),
    "Megatron-Core cross entropy": Method(_megatron, 3, needs="megatron"),
    "torch linear_cross_entropy": Method(_torch_chunked, 3, summed=True),
    "Liger": Method(_liger, 3, needs="liger_kernel", on_cpu=False, summed=True),
    "cut cross entropy": Method(_cut_cross_entropy, 4, needs="cut_cross_entropy", on_cpu=False),
    "matrix multiplications": Method(_bare, 4, bare=True),
}
