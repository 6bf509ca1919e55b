"""The batch arithmetic, the rules that span several fields, and the example configurations."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizer import write_tokenizer
from typer.testing import CliRunner

from chord_megatron.cli import app
from chord_megatron.config import Config
from chord_megatron.planning.plan import Plan, make_plan
from chord_megatron.planning.schedule import mu_at, mu_range
from chord_megatron.system.errors import UserError
from chord_megatron.weights.architecture import LatentAttention, MixtureOfExperts, ModelArchitecture
from chord_megatron.weights.hf_config import read_architecture

EXAMPLES = Path(__file__).parents[2] / "examples"

QWEN2_5_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shape of Qwen2.5-7B, which is all that planning reads, and some tokenizer."""
    path = tmp_path_factory.mktemp("Qwen2.5-7B")
    write_tokenizer(path)
    (path / "config.json").write_text(json.dumps(QWEN2_5_7B), encoding="utf-8")
    return path


SERVER = {
    "rollout__engine": "vllm",
    "rollout__vllm_mode": "server",
    "rollout__vllm_servers": ["http://127.0.0.1:8000"],
}
EXPERTS = MixtureOfExperts(
    num_experts=60, experts_per_token=4, ffn_hidden_size=1001, score_function="softmax", normalize_top_k=True
)
LATENT = LatentAttention(q_lora_rank=None, kv_lora_rank=511, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)


def plan_of(model_dir: Path, world_size: int, arch: ModelArchitecture | None = None, **changes: Any) -> Plan:
    """The plan of 32 prompts x 8 completions with experts; `changes` are group__leaf=value."""
    settings: dict[str, dict[str, Any]] = {
        "model": {"path": str(model_dir)},
        "data": {"dataset": "prompts.jsonl"},
        "chord": {"chord_sft_dataset": "experts.jsonl", "chord_sft_global_batch_size": 64},
        "train": {"output_dir": "out", "global_batch_size": 256, "micro_batch_size": 4, "train_iters": 12},
    }
    for key, value in changes.items():
        group, leaf = key.split("__")
        settings.setdefault(group, {})[leaf] = value
    return make_plan(Config.model_validate(settings), arch or read_architecture(model_dir), world_size)


def refusal(model_dir: Path, world_size: int = 8, arch: ModelArchitecture | None = None, **changes: Any) -> str:
    with pytest.raises(UserError) as error:
        plan_of(model_dir, world_size, arch, **changes)
    return str(error.value)


def test_batch_arithmetic(model_dir: Path):
    assert plan_of(model_dir, 8, parallel__tensor_model_parallel_size=2) == Plan(
        world_size=8,
        data_parallel_size=4,
        prompts_per_step=32,
        completions_per_step=256,
        expert_rows_per_step=64,
        micro_batches_per_step=20,  # (256 + 64) rows / 4 ranks / 4 a micro-batch
        expert_max_length=32768,  # all that the model reads
        steps_per_rollout=1,
    )


@pytest.mark.parametrize(
    ("world_size", "tensor_parallel", "micro_batch_size", "rows"),
    [
        (8, 1, 4, 64),  # 1 x DP 8 x 8 accumulation steps: ms-swift's reference run
        (8, 2, 4, 64),  # 1 x DP 4 x 16
        (8, 1, 8, 32),  # 1 x DP 8 x 4
        (1, 1, 256, 1),
    ],
)
def test_expert_rows_per_device_are_counted_as_in_ms_swift(
    model_dir: Path, world_size: int, tensor_parallel: int, micro_batch_size: int, rows: int
):
    plan = plan_of(
        model_dir,
        world_size,
        parallel__tensor_model_parallel_size=tensor_parallel,
        train__micro_batch_size=micro_batch_size,
        chord__chord_sft_global_batch_size=None,
        chord__chord_sft_per_device_train_batch_size=1,
    )
    assert plan.expert_rows_per_step == rows


def test_micro_batches_round_up(model_dir: Path):
    # 8 + 3 rows on one rank, 4 at a time.
    plan = plan_of(model_dir, 1, train__global_batch_size=8, chord__chord_sft_global_batch_size=3)
    assert plan.micro_batches_per_step == 3


def test_steps_that_share_a_generation_batch_multiply(model_dir: Path):
    assert plan_of(model_dir, 8, grpo__steps_per_generation=2, grpo__num_iterations=3).steps_per_rollout == 6


@pytest.mark.parametrize(
    ("settings", "row"),
    [
        (("parallel.pipeline_model_parallel_size=2",), "28 = 2 x 14, in the order of the stages"),
        (
            ("parallel.pipeline_model_parallel_size=8",),
            "28 = 3 + 6 x 4 + 1, in the order of the stages, by what they cost",
        ),
        (
            ("parallel.pipeline_model_parallel_size=4", "parallel.pipeline_layout=[8, 8, 8, 4]"),
            "28 = 3 x 8 + 4, in the order of the stages",
        ),
    ],
)
def test_validate_says_how_the_layers_are_cut(model_dir: Path, settings: tuple[str, ...], row: str):
    arguments = ["validate", str(EXAMPLES / "gsm8k/gsm8k.yaml"), f"model.path={model_dir}", "--nproc-per-node", "8"]
    arguments += ["parallel.tensor_model_parallel_size=1"]
    result = CliRunner().invoke(app, [*arguments, *settings], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.strip("│ ").split("│")[1].strip() for line in lines if "layers" in line] == [row]


@pytest.mark.parametrize(
    ("settings", "layout"),
    [
        ((), "8 processes = TP 2 x PP 1 x DP 4"),
        (("parallel.context_parallel_size=2",), "8 processes = TP 2 x PP 1 x CP 2 x DP 2"),
    ],
)
def test_validate_names_the_layout(model_dir: Path, settings: tuple[str, ...], layout: str):
    arguments = ["validate", str(EXAMPLES / "gsm8k/gsm8k.yaml"), f"model.path={model_dir}", "--nproc-per-node", "8"]
    result = CliRunner().invoke(app, [*arguments, *settings], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.stderr
    assert f"{layout}, sequence parallel" in result.stdout


def test_pipelines_and_virtual_stages_divide_the_layers(model_dir: Path):
    plan = plan_of(
        model_dir,
        8,
        parallel__pipeline_model_parallel_size=2,
        parallel__virtual_pipeline_model_parallel_size=7,
        parallel__tensor_model_parallel_size=4,
    )
    assert plan.data_parallel_size == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"parallel__tensor_model_parallel_size": 3},
            "parallel.tensor_model_parallel_size=3 does not divide the model's 28 attention heads; "
            "choose a divisor of 28",
        ),
        (
            {"parallel__tensor_model_parallel_size": 7},
            "parallel.tensor_model_parallel_size=7 does not divide the model's 4 query groups (key/value heads); "
            "choose a divisor of 4",
        ),
        (
            {"parallel__pipeline_model_parallel_size": 8, "parallel__pipeline_layout": [4, 4, 4, 4, 4, 4, 4, 4]},
            "parallel.pipeline_layout=[4, 4, 4, 4, 4, 4, ...] adds up to 32 layers, but the model has 28; mend it",
        ),
        (
            {"parallel__virtual_pipeline_model_parallel_size": 2},
            "parallel.virtual_pipeline_model_parallel_size=2 needs parallel.pipeline_model_parallel_size > 1; "
            "remove it or raise the pipeline size",
        ),
        (
            {"train__global_batch_size": 100},
            "train.global_batch_size=100 completions is not a multiple of rollout.num_generations=8, and every prompt "
            "needs its whole group; set train.global_batch_size to 96 or 128",
        ),
        (
            {"train__global_batch_size": 24},
            "train.global_batch_size=24 is not a multiple of train.micro_batch_size x data-parallel size = 4 x 8 = 32; "
            "set train.global_batch_size to 32",
        ),
        (
            {"chord__chord_sft_dataset": None},
            "chord.chord_sft_dataset is required while mu > 0; "
            "for GRPO alone set chord.chord_mu_peak=0 and chord.chord_mu_valley=0",
        ),
        (
            {"chord__chord_sft_per_device_train_batch_size": 1},
            "set exactly one of chord.chord_sft_global_batch_size and chord.chord_sft_per_device_train_batch_size",
        ),
        (
            {"chord__chord_sft_global_batch_size": None},
            "set exactly one of chord.chord_sft_global_batch_size and chord.chord_sft_per_device_train_batch_size",
        ),
        (
            {"rollout__engine": "replay"},
            "rollout.engine=replay and rollout.replay_from go together; set both or neither",
        ),
        (
            {"rollout__replay_from": "rollouts.jsonl"},
            "rollout.engine=replay and rollout.replay_from go together; set both or neither",
        ),
        (
            {"rollout__engine": "replay", "rollout__replay_from": "r.jsonl", "rollout__record_to": "r.jsonl"},
            "rollout.record_to and rollout.replay_from name one file; record into another one",
        ),
        (
            {"train__eval_steps": 5},
            "train.eval_steps needs data.eval_dataset; set it, or train.eval_steps=null for no evaluation",
        ),
        (
            {"data__max_prompt_length": 32768},
            "data.max_prompt_length + rollout.max_completion_length = 32768 + 256 = 33024 tokens, but the model reads "
            "32768; set data.max_prompt_length to at most 32512",
        ),
        (
            {"chord__chord_sft_max_length": 32769},
            "chord.chord_sft_max_length=32769, but the model reads 32768 tokens; lower it, or set it to null",
        ),
        (
            {"grpo__steps_per_generation": 5},
            "train.train_iters=12 is not a multiple of grpo.steps_per_generation x num_iterations = 5, and a "
            "generation batch is not kept in checkpoints; set it to 10 or 15",
        ),
        (
            {"grpo__num_iterations": 4, "train__save_steps": 6},
            "train.save_steps=6 is not a multiple of grpo.steps_per_generation x num_iterations = 4, and a generation "
            "batch is not kept in checkpoints; set it to 4 or 8",
        ),
        (
            {"optimizer__lr": 1e-6, "optimizer__min_lr": 1e-5},
            "optimizer.min_lr=1e-05 is above optimizer.lr=1e-06; lower it",
        ),
        (
            {"optimizer__lr_warmup_iters": 12},
            "optimizer.lr_warmup_iters=12 must be below train.train_iters=12; lower it",
        ),
        (
            {"optimizer__lr": 1e-2, "optimizer__weight_decay": 100.0},
            "optimizer.lr x weight_decay = 0.01 x 100.0 takes away a whole weight in a step; lower one of them",
        ),
        (
            {"rollout__num_generations": 1},
            "rollout.num_generations=1 gives every completion the advantage 0, so that nothing is learnt from "
            "rollouts; set it to 2 or more, or for supervised training alone chord.chord_mu_peak=1 and "
            "chord.chord_mu_valley=1",
        ),
        (
            {**SERVER, "train__eval_temperature": 2.5},
            "train.eval_temperature=2.5, but vLLM samples at 2.0 at most; lower it",
        ),
        (
            SERVER | {"rollout__vllm_servers": ["http://a:8000", "http://b:8000", "http://a:8000/"]},
            "rollout.vllm_servers names http://a:8000 twice; name each server once",
        ),
        (
            SERVER | {"rollout__weight_transfer_address": "tcp://10.0.0.4"},
            "rollout.weight_transfer_address='tcp://10.0.0.4' must be a host's name or address alone",
        ),
        (
            {"rollout__engine": "vllm"},
            "rollout.engine=vllm and rollout.vllm_mode (colocate or server) go together; set both or neither",
        ),
        (
            {"rollout__vllm_mode": "server"},
            "rollout.engine=vllm and rollout.vllm_mode (colocate or server) go together; set both or neither",
        ),
        (
            SERVER | {"rollout__sleep_level": 2},
            "rollout.sleep_level is for rollout.engine=vllm with rollout.vllm_mode=colocate; remove it",
        ),
        (
            {"rollout__weight_transfer": "broadcast"},
            "rollout.weight_transfer is for rollout.engine=vllm with rollout.vllm_mode=server; remove it",
        ),
        (
            SERVER | {"rollout__vllm_servers": []},
            "rollout.vllm_mode=server needs rollout.vllm_servers, such as ['http://127.0.0.1:8000']; start them with "
            "`chord-megatron serve`",
        ),
        (
            SERVER | {"rollout__vllm_servers": ["10.0.0.5:8000"]},
            "rollout.vllm_servers: '10.0.0.5:8000' must look like http://host:port",
        ),
        (
            SERVER | {"rollout__weight_transfer": "broadcast", "rollout__vllm_servers": ["http://10.0.0.5:8000"]},
            "rollout.weight_transfer_address=127.0.0.1 cannot be reached from the machine of http://10.0.0.5:8000; "
            "set it to an address of rank 0's machine",
        ),
        (
            {"rollout__engine": "vllm", "rollout__vllm_mode": "colocate", "rollout__vllm_tensor_parallel_size": 3},
            "rollout.vllm_tensor_parallel_size=3 must divide the 8 processes and the model's 28 attention heads; "
            "choose another",
        ),
        (
            SERVER | {"rollout__max_staleness": 1, "grpo__num_iterations": 2},
            "rollout.max_staleness=1 draws one batch ahead for each step; set grpo.steps_per_generation and "
            "grpo.num_iterations to 1",
        ),
    ],
)
def test_a_rule_names_the_values_and_the_remedy(model_dir: Path, changes: dict[str, Any], message: str):
    assert refusal(model_dir, **changes) == message


@pytest.mark.parametrize(
    ("world_size", "message"),
    [
        (1, "1 process cannot hold a model on tensor x pipeline = 4 x 2 = 8 ranks; "),
        (12, "12 processes cannot hold a model on tensor x pipeline = 4 x 2 = 8 ranks; "),
    ],
)
def test_the_number_of_processes_holds_whole_models(model_dir: Path, world_size: int, message: str):
    assert refusal(
        model_dir,
        world_size,
        parallel__tensor_model_parallel_size=4,
        parallel__pipeline_model_parallel_size=2,
    ) == (message + "start a multiple of 8 processes (--nproc-per-node, --nnodes)")


@pytest.mark.parametrize("world_size", [2, 6, 8])
def test_context_parallel_ranks_share_a_model_too(model_dir: Path, world_size: int):
    layout = {"parallel__tensor_model_parallel_size": 2, "parallel__context_parallel_size": 3}
    if world_size == 6:
        assert plan_of(model_dir, world_size, **layout).data_parallel_size == 1
    else:
        assert refusal(model_dir, world_size, **layout) == (
            f"{world_size} processes cannot hold a model on tensor x pipeline x context = 2 x 1 x 3 = 6 ranks; "
            "start a multiple of 6 processes (--nproc-per-node, --nnodes)"
        )


@pytest.mark.parametrize(
    ("features", "changes", "message"),
    [
        (
            {},
            {"parallel__expert_model_parallel_size": 2},
            "parallel.expert_model_parallel_size=2, but the model has no experts; set it to 1",
        ),
        (
            {},
            {"rollout__router_replay": "sampler"},
            "rollout.router_replay=sampler is for models with experts, and this one has none; remove it",
        ),
        (
            {"moe": EXPERTS},
            SERVER | {"rollout__router_replay": "sampler"},
            "rollout.router_replay=sampler needs an engine that says which experts served a token, and with vLLM this "
            "release does not ask; set it to trainer, or rollout.engine=megatron",
        ),
        (
            {"moe": EXPERTS},
            {"rollout__router_replay": "sampler", "model__transformer_config": {"moe_router_fusion": True}},
            "rollout.router_replay=sampler needs routers that can be told what to choose, and fused ones cannot; "
            "remove it, or model.transformer_config.moe_router_fusion",
        ),
        (
            {"moe": EXPERTS},
            {"rollout__router_replay": "trainer"},
            "rollout.router_replay=trainer changes nothing where an update is the first to score its completions; "
            "remove it, or set grpo.num_iterations above 1",
        ),
        (
            {"moe": EXPERTS},
            {
                "rollout__router_replay": "trainer",
                "grpo__steps_per_generation": 2,
                "grpo__old_log_probs": "sampler",
            },
            "rollout.router_replay=trainer changes nothing where an update is the first to score its completions; "
            "remove it, or set grpo.num_iterations above 1",
        ),
        (
            {"moe": EXPERTS},
            {"parallel__expert_model_parallel_size": 8},
            "parallel.expert_model_parallel_size=8 does not divide the model's 60 experts; choose a divisor of 60",
        ),
        (
            {"moe": EXPERTS},
            {"parallel__expert_model_parallel_size": 4, "parallel__pipeline_model_parallel_size": 4},
            "parallel.expert_model_parallel_size=4 does not divide the tensor x data = 2 ranks of a pipeline stage; "
            "choose a divisor of 2 or start more processes",
        ),
        (
            {"moe": EXPERTS},
            {
                "parallel__expert_model_parallel_size": 4,
                "parallel__context_parallel_size": 2,
                "parallel__pipeline_model_parallel_size": 4,
            },
            "parallel.expert_model_parallel_size=4 does not divide the tensor x context x data = 2 ranks of a pipeline "
            "stage; choose a divisor of 2 or start more processes",
        ),
        (
            {"moe": EXPERTS},
            {"parallel__tensor_model_parallel_size": 2},
            "parallel.tensor_model_parallel_size=2 of a model with experts needs parallel.sequence_parallel=true; "
            "set it",
        ),
        (
            {"mla": LATENT},
            {"parallel__tensor_model_parallel_size": 2},
            "parallel.tensor_model_parallel_size=2 of a model with latent attention needs "
            "parallel.sequence_parallel=true; set it",
        ),
        (
            {"moe": replace(EXPERTS, shared_ffn_hidden_size=2002)},
            {"parallel__tensor_model_parallel_size": 4},
            "parallel.tensor_model_parallel_size=4 does not divide the model's 2002 columns of shared experts; "
            "choose a divisor of 2002",
        ),
        (
            {"moe": replace(EXPERTS, dense_layers=(0,)), "ffn_hidden_size": 1002},
            {"parallel__tensor_model_parallel_size": 4},
            "parallel.tensor_model_parallel_size=4 does not divide the model's 1002 MLP columns; "
            "choose a divisor of 1002",
        ),
        (
            {"moe": replace(EXPERTS, experts_per_token=1)},
            {},
            "a model that normalizes the weight of a token's single expert cannot be trained; use another",
        ),
    ],
)
def test_a_rule_of_experts_or_latent_attention(
    model_dir: Path, features: dict[str, Any], changes: dict[str, Any], message: str
):
    arch = replace(read_architecture(model_dir), **features)
    assert refusal(model_dir, arch=arch, **changes) == message


@pytest.mark.parametrize(
    "changes",
    [
        {"rollout__router_replay": "sampler"},
        {"rollout__router_replay": "trainer", "grpo__num_iterations": 2},
        SERVER | {"rollout__router_replay": "trainer", "grpo__steps_per_generation": 2},
    ],
)
def test_routing_is_replayed_where_there_is_any(model_dir: Path, changes: dict[str, Any]):
    arch = replace(read_architecture(model_dir), moe=EXPERTS)
    updates = 1 if changes["rollout__router_replay"] == "sampler" else 2
    assert plan_of(model_dir, 8, arch, **changes).steps_per_rollout == updates


@pytest.mark.parametrize("context_parallel", [1, 2])
def test_experts_are_spread_over_the_ranks_of_a_stage(model_dir: Path, context_parallel: int):
    """Without shared experts, dense layers and query groups TP divides the attention heads only."""
    arch = replace(read_architecture(model_dir), moe=EXPERTS, mla=LATENT, ffn_hidden_size=1001, num_query_groups=1)
    plan = plan_of(
        model_dir,
        16,
        arch,
        parallel__tensor_model_parallel_size=2,
        parallel__pipeline_model_parallel_size=4,
        parallel__sequence_parallel=True,
        parallel__expert_model_parallel_size=4,
        parallel__context_parallel_size=context_parallel,
    )
    assert plan.data_parallel_size == 2 // context_parallel


@pytest.mark.parametrize(
    "url",
    [
        "http://h:0",
        "http://h:65536",
        "http://h:x",
        "http://[::1",
        "http://h/v1",
        "http:// h",
        "http://",
    ],
)
def test_an_address_that_no_server_has_is_refused(model_dir: Path, url: str):
    message = refusal(model_dir, **{**SERVER, "rollout__vllm_servers": [url]})
    assert message == f"rollout.vllm_servers: {url.rstrip('/')!r} must look like http://host:port"


@pytest.mark.parametrize("url", ["https://h", "http://h:65535/", "http://[::1]:8000", "http://10.0.0.5:80"])
def test_an_address_that_a_server_may_have_passes(model_dir: Path, url: str):
    plan_of(model_dir, 8, **{**SERVER, "rollout__vllm_servers": [url]})


def test_a_group_of_one_is_for_supervised_training_alone(model_dir: Path):
    changes = {"rollout__num_generations": 1, "chord__chord_mu_peak": 1, "chord__chord_mu_valley": 1}
    assert plan_of(model_dir, 8, **changes).prompts_per_step == 0
    assert refusal(model_dir, **{**changes, "chord__chord_mu_warmup_steps": 1}).startswith("rollout.num_generations=1")


def test_experts_are_as_long_as_the_model_reads_unless_told(model_dir: Path):
    short = replace(read_architecture(model_dir), max_position_embeddings=1500)
    assert plan_of(model_dir, 8, short).expert_max_length == 1500
    assert plan_of(model_dir, 8, short, chord__chord_sft_max_length=600).expert_max_length == 600


@pytest.mark.parametrize("peak", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("valley", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("warmup_steps", [0, 1, 2, 5])
@pytest.mark.parametrize("decay_steps", [0, 1, 3])
@pytest.mark.parametrize("train_iters", [1, 2, 4, 9])
def test_the_range_of_mu_is_that_of_its_steps(
    peak: float, valley: float, warmup_steps: int, decay_steps: int, train_iters: int
):
    config = Config.model_validate(
        {
            "model": {"path": "model"},
            "data": {"dataset": "prompts.jsonl"},
            "chord": {
                "chord_mu_peak": peak,
                "chord_mu_valley": valley,
                "chord_mu_warmup_steps": warmup_steps,
                "chord_mu_decay_steps": decay_steps,
            },
            "train": {"output_dir": "out", "global_batch_size": 8, "train_iters": train_iters},
        }
    )
    values = [mu_at(config, step) for step in range(train_iters)]
    assert mu_range(config) == (min(values), max(values))


def test_grpo_alone_needs_no_experts(model_dir: Path):
    plan = plan_of(
        model_dir,
        8,
        chord__chord_mu_peak=0,
        chord__chord_mu_valley=0,
        chord__chord_sft_dataset=None,
        chord__chord_sft_global_batch_size=None,
    )
    assert plan.expert_rows_per_step == 0


def test_experts_that_only_a_later_step_uses_are_required(model_dir: Path):
    """mu rises from 0: the first step alone would need none."""
    changes = {"chord__chord_mu_warmup_steps": 5, "chord__chord_mu_valley": 0, "chord__chord_sft_dataset": None}
    assert refusal(model_dir, **changes).startswith("chord.chord_sft_dataset is required while mu > 0")
    assert plan_of(model_dir, 8, train__train_iters=1, **changes).completions_per_step == 256


def test_mu_of_the_configured_schedule():
    config = Config.model_validate(
        {
            "model": {"path": "model"},
            "data": {"dataset": "prompts.jsonl"},
            "chord": {
                "chord_mu_peak": 0.9,
                "chord_mu_valley": 0.05,
                "chord_mu_warmup_steps": 2,
                "chord_mu_decay_steps": 4,
            },
            "train": {"output_dir": "out", "global_batch_size": 8, "train_iters": 9},
        }
    )
    # 0.9 s / 2, then 0.05 + 0.85 (1 + cos(pi (s - 2) / 4)) / 2, then 0.05.
    expected = [0.0, 0.45, 0.9, 0.7755204, 0.475, 0.1744796, 0.05, 0.05]
    assert [mu_at(config, step) for step in range(8)] == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    ("example", "rows"),
    [
        (
            "gsm8k/gsm8k.yaml",
            ("256 = 32 prompts x 8", "64", "8 processes = TP 2 x PP 1 x DP 4", "0.9 at step 0"),
        ),
        (
            "ms_swift_chord/chord_8gpu.yaml",
            ("256 = 32 prompts x 8", "64", "TP 2 x PP 1 x DP 4", "3 steps: 1 epoch of 100 prompts, 32 a step"),
        ),
    ],
)
def test_the_examples_validate(model_dir: Path, example: str, rows: tuple[str, ...]):
    prompts = model_dir / "prompts.jsonl"  # where epochs are counted
    prompts.write_text(json.dumps({"problem": "1 + 1", "solution": "2"}) + "\n", encoding="utf-8")
    prompts.write_text(prompts.read_text(encoding="utf-8") * 100, encoding="utf-8")
    arguments = ["validate", str(EXAMPLES / example), f"model.path={model_dir}", "--nproc-per-node", "8"]
    arguments += [f"data.dataset={prompts}", "data.prompt_format=text", "data.system_prompt=null"]
    arguments += ["tracking.report_to=[]"]  # packages of trackers may not be there
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.stderr
    for row in rows:
        assert row in result.stdout


def rows_of(*arguments: str) -> dict[str, str]:
    """What `validate --json` says in its summary."""
    result = CliRunner().invoke(app, ["validate", *arguments, "--json"])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)["summary"]


def test_validate_says_of_a_run_what_it_has(model_dir: Path):
    """At mu = 1 nothing is drawn, at mu = 0 no expert is read."""
    recipe = (str(EXAMPLES / "gsm8k/gsm8k.yaml"), f"model.path={model_dir}", "parallel.sequence_parallel=false")
    one = (*recipe, "parallel.tensor_model_parallel_size=1", "train.global_batch_size=8", "grpo.num_iterations=2")
    one = (*one, "train.train_iters=4", "train.save_steps=null", "optimizer.lr_warmup_iters=0")
    rows = rows_of(*one)
    assert rows["layout"].startswith("1 process = TP 1 x PP 1 x DP 1")
    assert (rows["prompts"], rows["completions"]) == ("1", "8 = 1 prompt x 8 completions")
    assert rows["rollouts"] == "megatron, new ones every 2 steps"
    assert rows_of(*one, "grpo.num_iterations=1")["rollouts"] == "megatron, new ones at every step"
    ends = ("chord.chord_mu_peak", "chord.chord_mu_valley")
    supervised, reinforced = (rows_of(*one, *(f"{end}={mu}" for end in ends)) for mu in (1, 0))
    assert rows.keys() - supervised.keys() == {"prompts", "completions", "rollouts"}
    assert rows.keys() - reinforced.keys() == {"expert rows"}


def test_supervised_training_needs_experts_alone(tmp_path: Path, model_dir: Path):
    """No prompts, no reference column, no reward (the one that is named is not there), no number of completions."""
    config = tmp_path / "sft.yaml"
    config.write_text(
        f"model: {{path: '{model_dir}'}}\nrewards: {{reward_funcs: ['none.py:function']}}\n"
        "chord: {chord_sft_dataset: e.jsonl, chord_sft_global_batch_size: 6, chord_mu_peak: 1, chord_mu_valley: 1}\n"
        "train: {output_dir: out, train_iters: 2, micro_batch_size: 4}\n",
        encoding="utf-8",
    )
    assert rows_of(str(config))["micro-batches"] == "2 on each data-parallel rank, of up to 4 packed sequences"


def test_rollouts_need_a_number_of_completions(model_dir: Path):
    assert refusal(model_dir, train__global_batch_size=None) == (
        "train.global_batch_size, the completions of an optimizer step, is required while mu < 1; for supervised "
        "training alone set chord.chord_mu_peak=1 and chord.chord_mu_valley=1"
    )
    changes = {"chord__chord_mu_peak": 1, "chord__chord_mu_valley": 1, "chord__chord_sft_global_batch_size": None}
    assert refusal(
        model_dir, **changes, chord__chord_sft_per_device_train_batch_size=1, train__global_batch_size=None
    ) == (
        "train.global_batch_size, the completions of an optimizer step, is required by "
        "chord.chord_sft_per_device_train_batch_size; or set chord.chord_sft_global_batch_size instead"
    )


def test_validate_looks_at_the_names_of_reward_functions(model_dir: Path):
    arguments = ["validate", str(EXAMPLES / "gsm8k/gsm8k.yaml"), f"model.path={model_dir}", "--nproc-per-node", "8"]
    result = CliRunner().invoke(app, [*arguments, "rewards.reward_funcs=[acuracy]"])
    assert (result.exit_code, result.stderr) == (
        2,
        "error: rewards.reward_funcs: unknown reward function 'acuracy'; use accuracy, format, soft_overlong or "
        "path.py:function; did you mean 'accuracy'?\n",
    )
    result = CliRunner().invoke(app, [*arguments, "rewards.reward_weights=[1.0, 2.0]"])
    assert (result.exit_code, result.stderr) == (
        2,
        "error: rewards.reward_weights has 2 values for 1 rewards.reward_funcs; give one for each, or null\n",
    )


def test_a_budget_of_tokens_needs_no_full_micro_batches(model_dir: Path):
    """6 prompts x 8 over 5 ranks: neither 4 rows a micro-batch nor the ranks divide 48."""
    changes = {"train__global_batch_size": 48, "train__max_tokens_per_micro_batch": 4096}
    assert plan_of(model_dir, 5, **changes).completions_per_step == 48
    assert refusal(model_dir, 5, **{**changes, "train__max_tokens_per_micro_batch": None}).startswith(
        "train.global_batch_size=48 is not a multiple of train.micro_batch_size x data-parallel size = 4 x 5 = 20; "
    )
    # What counts rows of micro-batches needs them full even so.
    assert "= 4 x 5 = 20; " in refusal(model_dir, 5, **changes, chord__semantics="trinity")


@pytest.mark.parametrize(
    ("changes", "what", "tokens"),
    [
        (
            {},
            "data.max_prompt_length + rollout.max_completion_length = 1024 + 256 = 1280",
            1280,
        ),
        (
            {"data__max_prompt_length": 100, "chord__chord_sft_max_length": 1001},
            "chord.chord_sft_max_length = 1001",
            1001,
        ),
    ],
)
def test_a_budget_below_the_longest_row(changes: dict[str, Any], what: str, tokens: int, model_dir: Path):
    assert refusal(model_dir, train__max_tokens_per_micro_batch=1000, **changes) == (
        f"train.max_tokens_per_micro_batch=1000 holds no row of {what} tokens; set it to at least {tokens}"
    )
