"""The memory of a rank by part: what `validate`, `doctor` and `plan` say, and what a layout must fit into."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from chord_megatron.config import Config
from chord_megatron.planning.activations import Kind, Layers, backward_bytes, chunks_in_flight, layer_bytes, share_of
from chord_megatron.planning.decoding_memory import kv_cache_bytes, prefill_bytes, sampling_bytes
from chord_megatron.planning.memory import ModelState, bytes_beside_sampler, model_states
from chord_megatron.planning.pipeline import stage_layers
from chord_megatron.planning.plan import Plan
from chord_megatron.planning.recomputation import Recomputation
from chord_megatron.planning.schedule import needs_rollouts
from chord_megatron.planning.workload import Workload, workload
from chord_megatron.system.sentences import size
from chord_megatron.weights.architecture import ModelArchitecture
from chord_megatron.weights.mapping import padded_vocab_size

_FLOAT32 = 4
# Tokens x vocabulary of the head's tiles on CPUs and GPUs: _TILES in ops/linear_log_probs.py.
_TILES: dict[Layers, tuple[int, int]] = {"local": (1024, 2048), "transformer_engine": (2048, 4096)}


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the device, of one rank of a pipeline stage, where every row is as long as it may be."""

    state: ModelState
    activations: int  # of the micro-batches under way, and of the backward pass of a layer
    head: int  # what turns hidden states into log-probs, on the last stage
    kv_cache: int = 0  # while the training weights decode
    generation: int = 0  # prompts and logits meanwhile; of a vLLM, the weights on their way to it
    sampler: int = 0  # of a vLLM on the same GPU
    beside_sampler: int = 0  # of the state, while that generates
    sampler_stays: bool = False  # while training, too

    @property
    def training(self) -> int:
        """In the backward pass."""
        return self.state.on_device + self.activations + self.head + self.sampler * self.sampler_stays

    @property
    def generating(self) -> int:
        """While completions are drawn."""
        return self.beside_sampler + self.kv_cache + self.generation + self.sampler

    @property
    def peak(self) -> int:
        """The larger of the two."""
        return max(self.training, self.generating)

    @property
    def always(self) -> int:
        """However short the rows are."""
        training = self.state.on_device + self.sampler * self.sampler_stays
        return max(training, self.beside_sampler + self.sampler)

    @property
    def state_in_words(self) -> str:
        """The sum between two steps."""
        state = self.state
        parts = f"{size(state.weights)} weights + {size(state.gradients)} gradients + {size(state.optimizer)} optimizer"
        return f"{size(state.on_device)} a process = {parts}"

    @property
    def step_in_words(self) -> str:
        """What training and drawing add to it."""
        phases = {"in training": (self.training, self._of_training), "in drawing": (self.generating, self._of_drawing)}
        said = []
        for phase, (total, parts) in phases.items():
            added = " + ".join(f"{size(nbytes)} {name}" for name, nbytes in parts.items() if nbytes)
            said += [f"{size(total)} {phase}, with {added}"] if added else []
        return "; ".join(said)

    def parts(self) -> dict[str, int]:
        """By name, for tables."""
        state = {"weights": self.state.weights, "gradients": self.state.gradients, "optimizer": self.state.optimizer}
        return state | self._of_training | self._of_drawing

    def parts_at_peak(self) -> dict[str, int]:
        """What comes on top of the state where the peak is, and the state as one."""
        if self.training >= self.generating:
            return {"weights, gradients and optimizer": self.state.on_device, **self._of_training}
        return {"weights, gradients and optimizer": self.beside_sampler, **self._of_drawing}

    @property
    def _of_training(self) -> dict[str, int]:
        return {"activations": self.activations, "head": self.head}

    @property
    def _of_drawing(self) -> dict[str, int]:
        return {"KV cache": self.kv_cache, "generation": self.generation, "vLLM": self.sampler}


def fullest_rank(
    config: Config, arch: ModelArchitecture, plan: Plan, *, layers: Layers, gpu_bytes: int = 0
) -> RankMemory:
    """The rank that needs most."""
    return max(rank_memories(config, arch, plan, layers=layers, gpu_bytes=gpu_bytes), key=lambda rank: rank.peak)


def rank_memories(
    config: Config, arch: ModelArchitecture, plan: Plan, *, layers: Layers, gpu_bytes: int = 0
) -> list[RankMemory]:
    """A rank of each pipeline stage. gpu_bytes: of the GPU that a colocated vLLM takes its share of."""
    rollout, load = config.rollout, workload(config, plan)
    sampler = int(rollout.vllm_gpu_memory_utilization * gpu_bytes) if rollout.vllm_mode == "colocate" else 0
    is_embedded = rollout.engine == "megatron" and needs_rollouts(config)
    stages = _layers_of_stages(config, arch)
    ranks = []
    for stage, state in enumerate(model_states(config, arch, plan)):
        is_last = stage == len(stages) - 1
        ranks.append(
            RankMemory(
                state=state,
                activations=_activations(config, arch, load, layers, stage),
                head=_head(config, arch, load, layers) if is_last else 0,
                kv_cache=_kv_cache(config, arch, plan, stages[stage]) if is_embedded else 0,
                generation=_generation(config, arch, plan, is_embedded=is_embedded, is_last=is_last),
                sampler=sampler,
                beside_sampler=bytes_beside_sampler(state, rollout),
                sampler_stays=rollout.sleep_level == 0,
            )
        )
    return ranks


def _layers_of_stages(config: Config, arch: ModelArchitecture) -> list[list[range]]:
    """The layers (0-based) of each chunk of each pipeline rank."""
    pp = config.parallel.pipeline_model_parallel_size
    bounds = pairwise(accumulate(stage_layers(config.parallel, arch), initial=0))
    virtual = [range(first, end) for first, end in bounds]
    return [virtual[stage::pp] for stage in range(pp)]


def _activations(config: Config, arch: ModelArchitecture, load: Workload, layers: Layers, stage: int) -> int:
    """Kept of the micro-batches under way, and needed at the worst moment of a backward pass beside that.

    That moment is in a layer; or at the end of a micro-batch's backward pass, where what it kept is gone and the
    embedding's gradient is there in the model's dtype.
    """
    parallel, itemsize = config.parallel, getattr(torch, config.model.dtype).itemsize
    tokens = -(-load.tokens_per_micro_batch // parallel.context_parallel_size)
    chunks = _layers_of_stages(config, arch)[stage]
    hidden = arch.hidden_size * itemsize * share_of("sequence", parallel)

    kind = Kind(layers, itemsize, load.longest_row, parallel.context_parallel_size)
    again = Recomputation(config.model)
    kinds = {arch.is_moe_layer(layer) for chunk in chunks for layer in chunk}
    whole = {is_moe: layer_bytes(arch, parallel, is_moe=is_moe, kind=kind) for is_moe in kinds}
    parts = kind._replace(recompute=again.modules)
    kept = {is_moe: layer_bytes(arch, parallel, is_moe=is_moe, kind=parts) for is_moe in kinds}
    of_chunks = [again.kept([kept[arch.is_moe_layer(layer)] for layer in chunk], hidden) for chunk in chunks]
    # What was sent to the next stage stays until its gradient comes back.
    is_last = stage == parallel.pipeline_model_parallel_size - 1
    sent = [hidden * (not (is_last and chunk == len(chunks) - 1)) for chunk in range(len(chunks))]
    counts = chunks_in_flight(parallel, stage, load.most_micro_batches)
    in_flight = tokens * sum(count * (of_chunk + s) for count, of_chunk, s in zip(counts, of_chunks, sent))
    working = [
        backward_bytes(arch, parallel, is_moe=is_moe, kind=kind, tokens=tokens)
        + tokens * (again.layers_at_once * whole[is_moe] if again.layers_at_once else whole[is_moe] - kept[is_moe])
        for is_moe in kinds
    ]
    vocabulary = padded_vocab_size(arch.vocab_size, parallel.tensor_model_parallel_size)
    embedding = vocabulary // parallel.tensor_model_parallel_size * arch.hidden_size * itemsize * (stage == 0)
    return math.ceil(max(in_flight + max(working, default=0), in_flight - tokens * of_chunks[0] + embedding))


def _head(config: Config, arch: ModelArchitecture, load: Workload, layers: Layers) -> int:
    """Final norm and head of one micro-batch (ops/linear_log_probs.py).

    Kept: the norm's tensors, as of a layer's. In the backward pass: a tile of logits and as much scratch in float32;
    the gradient of a block of rows in float32, and of the block before, which is being summed over TP; under sequence
    parallelism two blocks of rows from other ranks; the gradient of the hidden states. On a GPU the unwritten gradient
    of the weight in the model's dtype that stands for the sum (ops/weight_gradient.py); memory that is never written
    to costs nothing on a CPU, where bfloat16 is converted by tiles.
    """
    parallel, itemsize = config.parallel, getattr(torch, config.model.dtype).itemsize
    tokens, hidden = -(-load.tokens_per_micro_batch // parallel.context_parallel_size), arch.hidden_size
    tp = parallel.tensor_model_parallel_size
    columns = padded_vocab_size(arch.vocab_size, tp) // tp
    block, width = min(_TILES[layers][0], tokens), min(_TILES[layers][1], columns)
    size_of_norm = {"local": 2 * _FLOAT32 + itemsize, "transformer_engine": 2 * itemsize}[layers]
    of_tokens = (size_of_norm + itemsize) * tokens * hidden * share_of("sequence", parallel)
    of_blocks = 2 * block * (width + hidden) * _FLOAT32
    if parallel.sequence_parallel and tp > 1:
        of_blocks += 2 * block * hidden * itemsize
    of_weight = columns * hidden * itemsize if layers == "transformer_engine" else 0
    if layers == "local" and itemsize < _FLOAT32:
        of_weight = (width + block) * hidden * _FLOAT32
    return math.ceil(of_tokens + of_blocks + of_weight)


def _kv_cache(config: Config, arch: ModelArchitecture, plan: Plan, chunks: list[range]) -> int:
    itemsize, layers = getattr(torch, config.model.dtype).itemsize, sum(map(len, chunks))
    return kv_cache_bytes(config, arch, plan, layers=layers, itemsize=itemsize)


def _generation(config: Config, arch: ModelArchitecture, plan: Plan, *, is_embedded: bool, is_last: bool) -> int:
    itemsize = getattr(torch, config.model.dtype).itemsize
    if config.rollout.engine == "vllm":  # full weights are gathered so many at a time
        return config.model.export_bucket_megabytes * 10**6
    if not is_embedded:
        return 0
    # A prompt's logits are those of its last position, so that one comes after the other.
    prefill = prefill_bytes(config, arch, plan, itemsize=itemsize)
    return max(prefill, sampling_bytes(config, arch, plan, itemsize=itemsize) if is_last else 0)
