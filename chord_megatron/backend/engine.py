"""MegatronEngine: a model under a parallel layout, with its optimizer. No Megatron type leaves it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from chord_megatron.backend import checkpoint
from chord_megatron.backend.acceleration import choose_acceleration, describe, find_installed
from chord_megatron.backend.checkpoint_writer import Copies
from chord_megatron.backend.generation import generate_batch
from chord_megatron.backend.groups import ParallelGroups
from chord_megatron.backend.hf_weights import export_hf_weights, load_hf_weights, named_weights
from chord_megatron.backend.last_stages import gather_rows, reduce_results
from chord_megatron.backend.megatron_weights import load_megatron_weights
from chord_megatron.backend.model import build_model_chunks, run_micro_batch, unwrap, wrap_data_parallel
from chord_megatron.backend.offload import HostMemory, optimizer_tensors
from chord_megatron.backend.optimizer import build_optimizer, build_scheduler
from chord_megatron.backend.router_replay import ChunkRouters, count_routing, listening, of_samples
from chord_megatron.backend.transformer_options import refusals_named, token_multiple
from chord_megatron.batching.packing import BatchLayout, unpack
from chord_megatron.batching.routing import routed_live
from chord_megatron.checkpoints.metadata import METADATA_FILE
from chord_megatron.checkpoints.reader import check_weights
from chord_megatron.config import ModelConfig, OptimizerConfig, ParallelConfig
from chord_megatron.planning.pipeline import attention_length
from chord_megatron.system.background import Background
from chord_megatron.types import (
    GlobalBatch,
    GradientComparison,
    LossResult,
    LossTotals,
    MicroBatch,
    RoutingCounts,
    SamplingParams,
)
from chord_megatron.weights.hf_config import read_architecture


@dataclasses.dataclass(frozen=True)
class OptimizerStep:
    """What an optimizer step did."""

    grad_norm: float  # before clipping
    lr: float
    stepped: bool  # False: non-finite loss or gradient norm somewhere, weights and optimizer are as before


LossFunction = Callable[[Tensor, Tensor, MicroBatch], LossResult]  # (log_probs [tokens], entropy [tokens], micro-batch)
_NON_FINITE = "non-finite losses"  # a sum beside those of the loss function


class MegatronEngine:
    """Trains and evaluates one model; every method is a collective call of all ranks."""

    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        optimizer: OptimizerConfig | None,
        groups: ParallelGroups,
        *,
        train_iters: int,
        keep_reference: bool,
    ) -> None:
        """optimizer: None = for evaluation: no gradients, no optimizer, no memory for either."""
        self.groups = groups
        self._model_dir = Path(model.path)
        self.arch = read_architecture(self._model_dir)
        check_weights(self._model_dir, self.arch)
        installed = find_installed()
        acceleration = choose_acceleration(
            installed,
            data_parallel_size=groups.dp_cp_group.size(),
            context_parallel_size=groups.cp_size,
            overlap_grad_reduce=optimizer.overlap_grad_reduce if optimizer else False,
        )
        self.acceleration_note = describe(acceleration, installed)
        self._can_share_prompts = acceleration.share_prompts
        with refusals_named(model):
            chunks = build_model_chunks(self.arch, model, parallel, groups, acceleration)
        if (self._model_dir / METADATA_FILE).is_file():
            load_megatron_weights(chunks, self._model_dir, self.arch)
        else:
            load_hf_weights(chunks, self._model_dir, self.arch, groups)
        # On the host: it is needed once a step, and a second model on the device is what others run out of memory by.
        self._reference = [p.detach().cpu().clone() for _, p in named_weights(chunks)] if keep_reference else None
        self._chunks: list[Any] = chunks
        if optimizer is not None:
            self._chunks = wrap_data_parallel(
                chunks,
                use_distributed_optimizer=optimizer.use_distributed_optimizer,
                overlap_grad_reduce=acceleration.overlap_grad_reduce,
                grad_reduce_in_fp32=optimizer.main_grads_dtype == "float32",
            )
            self._optimizer = build_optimizer(optimizer, model, self._chunks)
            self._scheduler = build_scheduler(self._optimizer, optimizer, train_iters)
            self._clip_grad = optimizer.clip_grad
        self._bucket_bytes = model.export_bucket_megabytes * 10**6
        self.policy_version = 0  # optimizer steps that the weights have taken
        self._loss_is_finite = True
        self._has_gradients = False
        self._host_memory: dict[str, HostMemory] = {}  # of what is offloaded: "model", "optimizer"
        self._copies: Copies = {}  # of what is saved in the background
        self._spare_host_memory: dict[str, HostMemory] = {}  # kept for the next time: pinned memory is slow to get

    @property
    def batch_layout(self) -> BatchLayout:
        """What this layout asks of a batch."""
        config = unwrap(self._chunks[0]).config
        tokens = self.groups.tp_size if config.sequence_parallel else 1
        return BatchLayout(
            dp_rank=self.groups.dp_rank,
            dp_size=self.groups.dp_size,
            cp_rank=self.groups.cp_rank,
            cp_size=self.groups.cp_size,
            pad_to_multiple=tokens * token_multiple(config),
            # The interleaved schedule runs micro-batches in groups of the pipeline size.
            micro_batch_multiple=self.groups.pp_size if self.groups.vpp_size else 1,
            attention_length=attention_length(self.arch),
            can_share_prompts=self._can_share_prompts,
        )

    def compute_log_probs(self, batch: GlobalBatch, *, reference: bool = False) -> list[Tensor]:
        """Log-probs of each sample's tokens, [length] each, on every rank; 0 where its mask is off, and at the first.

        reference: of the frozen initial model instead of the current one; its own routers choose.
        """
        self._assert_here("model")
        if reference:
            self._swap_reference()
        (log_probs,) = self._of_each_token(routed_live(batch) if reference else batch, compute_entropy=False)
        if reference:
            self._swap_reference()
        return log_probs

    def compute_log_probs_and_entropies(self, batch: GlobalBatch) -> tuple[list[Tensor], list[Tensor]]:
        """`compute_log_probs` of the current model, and the entropy at each of those tokens, in one pass."""
        self._assert_here("model")
        log_probs, entropies = self._of_each_token(batch, compute_entropy=True)
        return log_probs, entropies

    @contextlib.contextmanager
    def recorded_routing(self, batch: GlobalBatch) -> Iterator[list[Tensor]]:
        """Of one pass over the batch within: the experts of each sample's tokens (TrainingSample.routing), at the end.

        Of a model without experts the list stays empty.
        """
        rows: list[Tensor] = []
        with listening(self._routers) as heard:
            yield rows
        if self.arch.moe is not None:
            rows.extend(of_samples(heard, batch, self.arch, self.groups))

    @torch.no_grad()
    def _of_each_token(self, batch: GlobalBatch, *, compute_entropy: bool) -> list[list[Tensor]]:
        """Log-probs, and entropies where asked for, of each sample's tokens."""

        def collect(log_probs: Tensor, entropy: Tensor | None, micro_batch: MicroBatch) -> tuple[Tensor, int, dict]:
            kinds = [log_probs] if entropy is None else [log_probs, entropy]
            rows = (unpack(micro_batch, values.float(), batch.lengths) for values in kinds)
            return log_probs.sum(), 0, dict(enumerate(rows))

        outputs = self._run_schedule(batch, collect, forward_only=True, compute_entropy=compute_entropy)
        kinds = range(1 + compute_entropy)
        return [gather_rows(batch, [output[kind] for output in outputs], self.groups) for kind in kinds]

    def forward_backward(
        self, batch: GlobalBatch, loss_fn: LossFunction, *, keep_log_probs: bool = False
    ) -> LossTotals:
        """Accumulate the gradient of the sum of `loss_fn` over all micro-batches of all ranks.

        keep_log_probs: return those of this pass, too, as `compute_log_probs` would; 0 of samples that are not run.
        """
        self._assert_here("model", "optimizer")
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        for routers in self._routers:
            routers.take_counts()  # of other passes

        kept: list[dict[int, Tensor]] = []

        def scaled(log_probs: Tensor, entropy: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, int, LossResult]:
            if keep_log_probs:
                kept.append(unpack(micro_batch, log_probs.detach().float(), batch.lengths))
            result = loss_fn(log_probs, entropy, micro_batch)
            non_finite = (~torch.isfinite(result.loss.detach())).double()
            described = result._replace(loss=result.loss.detach(), sums={**result.sums, _NON_FINITE: non_finite})
            # Megatron divides the summed gradient by the summed counts, which is batch.num_tokens again.
            return batch.num_tokens * result.loss, micro_batch.num_tokens, described

        outputs = self._run_schedule(batch, scaled, forward_only=False, compute_entropy=True)
        totals = reduce_results(batch, outputs, self.groups)
        self._loss_is_finite = totals.sums.pop(_NON_FINITE) == 0
        self._has_gradients = True
        return totals._replace(log_probs=gather_rows(batch, kept, self.groups)) if keep_log_probs else totals

    def count_routing(self) -> RoutingCounts | None:
        """What the routers did in the last `forward_backward`; None without experts, or of fused routers."""
        return count_routing(self._routers)

    def compare_gradients(self, batch: GlobalBatch, loss_a: LossFunction, loss_b: LossFunction) -> GradientComparison:
        """The norms of two losses' gradients and their cosine, by two backward passes. No gradient is left behind.

        The cosine is (|u + v|^2 - |u - v|^2) / 4 of the two unit vectors, so that Megatron-Core's norm, which knows
        what is sharded, replicated and shared, does all the counting. Keeps a second copy of the gradients meanwhile.
        """
        buffers = (buffer for chunk in self._chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers)
        gradients = [buffer.grad_data for buffer in buffers]
        self.forward_backward(batch, loss_a)
        norm_a, kept = self._gradient_norm(), [gradient.clone() for gradient in gradients]
        self.forward_backward(batch, loss_b)
        norm_b = self._gradient_norm()
        scale_a, scale_b = (1 / norm if 0 < norm < math.inf else 0.0 for norm in (norm_a, norm_b))
        norms = []
        for scale_of_b, step_along_a in ((scale_b, scale_a), (1.0, -2 * scale_a)):
            for gradient, other in zip(gradients, kept):
                gradient.mul_(scale_of_b).add_(other, alpha=step_along_a)
            norms.append(self._gradient_norm())
        self._has_gradients = False
        cosine = (norms[0] ** 2 - norms[1] ** 2) / 4 if scale_a and scale_b else math.nan
        # What steers a run must not differ by a bit between ranks that computed it each by itself.
        found = torch.tensor([norm_a, norm_b, cosine], dtype=torch.float64, device=self.groups.device)
        dist.broadcast(found, src=0)
        return GradientComparison(*found.tolist())

    def optimizer_step(self) -> OptimizerStep:
        """Clip, step, advance the learning rate; on a non-finite loss or norm on any rank, all skip together."""
        self._assert_here("model", "optimizer")
        assert self._has_gradients, "there are no gradients: forward_backward comes first, and offloading drops them"
        lr = self._optimizer.param_groups[0]["lr"]
        found_inf = self._optimizer.prepare_grads()
        grad_norm = float(self._optimizer.get_grad_norm())
        finite = torch.tensor(
            [float(math.isfinite(grad_norm) and self._loss_is_finite and not found_inf)],
            device=self.groups.device,
        )
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        stepped = bool(finite.item())
        if stepped:
            for inner in self._optimizer.chained_optimizers:
                if self._clip_grad > 0:
                    is_decoupled = inner.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
                    clip_grad_by_total_norm_fp32(inner.get_parameters(), self._clip_grad, grad_norm, is_decoupled)
            self._optimizer.step_with_ready_grads()
            self.policy_version += 1
        self._scheduler.step(increment=1)
        return OptimizerStep(grad_norm, lr, stepped)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        record_routing: bool = False,
        tell: Callable[[int], None] = lambda ended: None,
    ) -> list[tuple[Tensor, ...]]:
        """(completion tokens int32, their log-probs float32) of each prompt, on the host, by KV-cache decoding.

        seeds: what each completion's random numbers are drawn from; nothing else influences them. record_routing: and,
        as a third, the experts of the tokens of prompt and completion (RolloutSample.routing). tell: is called with
        each token, and told how many completions have ended.
        """
        self._assert_here("model")
        return generate_batch(
            self._chunks, prompts, seeds, params, self.groups, record_routing=record_routing, tell=tell
        )

    def export_hf_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(HF name, full tensor) of the current weights, in the order of `hf_tensors`; every rank must exhaust it."""
        self._assert_here("model")
        return export_hf_weights(self._chunks, self.arch, self.groups, self._bucket_bytes)

    def save(self, directory: Path, state: dict[str, Any]) -> None:
        """Write model, optimizer, scheduler, random state and `state` (plain JSON values) to `directory`."""
        with self.saving(directory, state, in_background=False):
            pass

    def saving(
        self, directory: Path, state: dict[str, Any], *, in_background: bool
    ) -> contextlib.AbstractContextManager[Background]:
        """The same as a context, at whose end it is there; training may go on within it in the background alone."""
        self._assert_here("model", "optimizer")
        return checkpoint.saving(
            directory,
            self._chunks,
            self._optimizer,
            self._scheduler,
            state,
            self.groups,
            model_dir=self._model_dir,
            arch=self.arch,
            copies=self._copies if in_background else None,
        )

    def load(self, directory: Path) -> dict[str, Any]:
        """Read what `save` wrote, under this or another layout; returns `state`."""
        self._assert_here("model", "optimizer")
        return checkpoint.load(directory, self._chunks, self._optimizer, self._scheduler, self.groups)

    @contextlib.contextmanager
    def offloaded(self, *, optimizer: bool, model: bool) -> Iterator[None]:
        """Leave the device's memory to others meanwhile: of master weights, moments and gradients; of parameters.

        Afterwards all is back as it was, on an exception too, but for the gradients: those are zero. Methods that need
        what is offloaded raise AssertionError. Parts may be offloaded one inside the other.
        """
        parts = [part for part, wanted in (("optimizer", optimizer), ("model", model)) if wanted]
        assert not self._host_memory.keys() & set(parts), "offloaded already"
        parameters = [parameter for chunk in self._chunks for parameter in chunk.parameters()]
        try:
            for part in parts:
                memory = self._spare_host_memory.pop(part, None) or HostMemory(self.groups.device)
                if part == "model":
                    memory.offload(parameters)
                else:
                    self._optimizer.zero_grad()
                    self._has_gradients = False
                    gradients = [parameter.main_grad for parameter in parameters if parameter.requires_grad]
                    memory.offload(optimizer_tensors(self._optimizer, parameters), gradients)
                self._host_memory[part] = memory
            yield
        finally:
            for part in parts:
                if part in self._host_memory:
                    self._spare_host_memory[part] = self._host_memory.pop(part)
                    self._spare_host_memory[part].restore()

    @property
    def _routers(self) -> list[ChunkRouters]:
        return [unwrap(chunk).routers for chunk in self._chunks]

    def _assert_here(self, *needed: str) -> None:
        missing = " and ".join(sorted(self._host_memory.keys() & set(needed)))
        assert not missing, f"the {missing} is offloaded: leave the `offloaded` context first"

    def _run_schedule(
        self, batch: GlobalBatch, loss_fn: Callable, *, forward_only: bool, compute_entropy: bool
    ) -> list[Any]:
        """One pass of Megatron-Core's pipeline schedule; the loss results of the last stage."""
        micro_batches = [micro_batch.to(self.groups.device) for micro_batch in batch.micro_batches]
        # Each model chunk of an interleaved pipeline walks through the same micro-batches.
        iterators = [iter(micro_batches) for _ in self._chunks]
        outputs = get_forward_backward_func()(
            forward_step_func=partial(_forward_step, loss_fn, compute_entropy),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self._chunks if len(self._chunks) > 1 else self._chunks[0],
            num_microbatches=len(micro_batches),
            seq_length=max(len(micro_batch.input_ids) for micro_batch in micro_batches),
            micro_batch_size=1,
            forward_only=forward_only,
        )
        for routers in self._routers:
            routers.batch = None  # of the last layers that were run again
        return outputs

    def _gradient_norm(self) -> float:
        """Of what is in the gradient buffers."""
        self._optimizer.prepare_grads()
        return float(self._optimizer.get_grad_norm())

    def _swap_reference(self) -> None:
        """Exchange the current weights and the reference's."""
        assert self._reference is not None, "built without keep_reference"
        for index, (_, parameter) in enumerate(named_weights(self._chunks)):
            current = parameter.detach().cpu().clone()
            parameter.data.copy_(self._reference[index])
            self._reference[index] = current


def _forward_step(
    loss_fn: Callable, compute_entropy: bool, data_iterator: Iterator[MicroBatch], model: torch.nn.Module
) -> tuple[Any, Callable]:
    batch = next(data_iterator)
    with unwrap(model).routers.running(batch):
        output = run_micro_batch(model, batch, compute_entropy=compute_entropy)
    return output, lambda result: loss_fn(*result, batch)
