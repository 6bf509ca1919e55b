"""Rules of the parallel layout: what a model can be split into, and over how many processes."""

from __future__ import annotations

from chord_megatron.config import Config, ParallelConfig
from chord_megatron.planning.pipeline import stage_layers
from chord_megatron.system.errors import UserError
from chord_megatron.system.sentences import counted
from chord_megatron.weights.architecture import MixtureOfExperts, ModelArchitecture


def check_layout(config: Config, arch: ModelArchitecture, world_size: int) -> int:
    """The data-parallel size. Raises UserError."""
    parallel = config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    cp = parallel.context_parallel_size
    _check_tensor_parallel(parallel, arch)
    _check_pipeline_parallel(parallel, arch)
    ranks = tp * pp * cp
    if world_size % ranks:
        kinds, sizes = "tensor x pipeline", f"{tp} x {pp}"
        if cp > 1:
            kinds, sizes = f"{kinds} x context", f"{sizes} x {cp}"
        raise UserError(
            f"{counted(world_size, 'process', 'processes')} cannot hold a model on {kinds} = {sizes} = {ranks} ranks; "
            f"start a multiple of {ranks} processes (--nproc-per-node, --nnodes)"
        )
    _check_expert_parallel(parallel, arch, ranks_per_stage=world_size // pp)
    return world_size // ranks


def _check_tensor_parallel(parallel: ParallelConfig, arch: ModelArchitecture) -> None:
    tp, moe = parallel.tensor_model_parallel_size, arch.moe
    # Experts are never split, and neither are the down projections of latent attention.
    split = [("attention heads", arch.num_attention_heads)]
    if arch.mla is None:
        split.append(("query groups (key/value heads)", arch.num_query_groups))
    if moe is None or moe.dense_layers:
        split.append(("MLP columns", arch.ffn_hidden_size))
    if moe is not None and moe.shared_ffn_hidden_size is not None:
        split.append(("columns of shared experts", moe.shared_ffn_hidden_size))
    for what, size in split:
        if size % tp:
            raise UserError(
                f"parallel.tensor_model_parallel_size={tp} does not divide the model's {size} {what}; "
                f"choose a divisor of {size}"
            )
    if tp > 1 and not parallel.sequence_parallel and (moe is not None or arch.mla is not None):
        what = "experts" if moe is not None else "latent attention"
        raise UserError(
            f"parallel.tensor_model_parallel_size={tp} of a model with {what} needs parallel.sequence_parallel=true; "
            "set it"
        )


def _check_pipeline_parallel(parallel: ParallelConfig, arch: ModelArchitecture) -> None:
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    if vpp is not None and pp == 1:
        raise UserError(
            f"parallel.virtual_pipeline_model_parallel_size={vpp} needs parallel.pipeline_model_parallel_size > 1; "
            "remove it or raise the pipeline size"
        )
    stage_layers(parallel, arch)


def _check_expert_parallel(parallel: ParallelConfig, arch: ModelArchitecture, *, ranks_per_stage: int) -> None:
    ep, moe = parallel.expert_model_parallel_size, arch.moe
    key = f"parallel.expert_model_parallel_size={ep}"
    if moe is None:
        if ep > 1:
            raise UserError(f"{key}, but the model has no experts; set it to 1")
        return
    _check_router(moe)
    if moe.num_experts % ep:
        raise UserError(
            f"{key} does not divide the model's {moe.num_experts} experts; choose a divisor of {moe.num_experts}"
        )
    if ranks_per_stage % ep:
        kinds = "context x data" if parallel.context_parallel_size > 1 else "data"
        raise UserError(
            f"{key} does not divide the tensor x {kinds} = {ranks_per_stage} ranks of a pipeline stage; "
            f"choose a divisor of {ranks_per_stage} or start more processes"
        )


def _check_router(moe: MixtureOfExperts) -> None:
    """Refuse what Megatron-Core's topk_routing_with_score_function computes otherwise than transformers."""
    if moe.experts_per_token == 1 and moe.normalize_top_k:
        raise UserError("a model that normalizes the weight of a token's single expert cannot be trained; use another")
