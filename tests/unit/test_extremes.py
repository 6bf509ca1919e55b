"""Every key of the configuration at its extremes: it makes a plan that computes, or one sentence says what to set."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic.fields import FieldInfo

from chord_megatron.algorithm.objective import chord_loss
from chord_megatron.batching.packing import BatchLayout, build_global_batch
from chord_megatron.config import Config, load_config
from chord_megatron.config_types import sources_of
from chord_megatron.ops.sampling import sample_tokens, seed_number
from chord_megatron.planning.plan import Plan, make_plan
from chord_megatron.planning.rank_memory import fullest_rank
from chord_megatron.planning.schedule import mu_at
from chord_megatron.system.errors import UserError
from chord_megatron.system.yaml_text import write_yaml
from chord_megatron.training.objective import build_means, build_objective
from chord_megatron.types import TrainingSample
from chord_megatron.weights.architecture import ModelArchitecture

ARCH = ModelArchitecture(
    family="qwen3",
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=16,
    vocab_size=300,
    max_position_embeddings=2048,
    rope_theta=1e4,
    norm_eps=1e-6,
    tie_word_embeddings=False,
    qkv_bias=False,
    qk_layernorm=True,
)
BASE: dict[str, dict[str, Any]] = {
    "model": {"path": "model"},
    "data": {"dataset": "prompts.jsonl"},
    "chord": {"chord_sft_dataset": "experts.jsonl", "chord_sft_global_batch_size": 8},
    "train": {"output_dir": "out", "global_batch_size": 32, "micro_batch_size": 4, "train_iters": 12},
}
SERVERS = {"engine": "vllm", "vllm_mode": "server", "vllm_servers": ["http://10.0.0.5:8000"]}
COLOCATED = {"engine": "vllm", "vllm_mode": "colocate"}
# What other keys a key needs, where it needs any.
BESIDE: dict[str, dict[str, Any]] = {
    "vllm_server_timeout": SERVERS,
    "weight_transfer": {**SERVERS, "weight_transfer_address": "10.0.0.4"},
    "weight_transfer_dir": SERVERS,
    "weight_transfer_address": {**SERVERS, "weight_transfer": "broadcast"},
    "max_staleness": SERVERS,
    "vllm_servers": {"engine": "vllm", "vllm_mode": "server"},
    "vllm_tensor_parallel_size": COLOCATED,
    "vllm_gpu_memory_utilization": COLOCATED,
    "sleep_level": COLOCATED,
    "replay_from": {"engine": "replay"},
}

HUGE = 10**30
NUMBERS: list[Any] = [0, 1, 2, -1, 3, 7, 12, 2**31 - 1, 2**31, 2**32, 2**64, HUGE, 10**400, -HUGE]
FLOATS: list[Any] = [
    0.0,
    -0.0,
    0.5,
    1.0,
    1.5,
    2.0,
    -1.0,
    1e-3,
    1e-30,
    5e-324,
    1e-300,
    1e30,
    1e39,
    1e308,
    math.inf,
    math.nan,
]
TEXTS: list[Any] = [
    *("", " ", "x", "no", "1e-6", "a\0b", "\ud800", "../x", "/", "http://", "http://h:99999", "http://h:x"),
    *(
        "http://[::1",
        "http://u:p@h:1",
        "http://h:8000/",
        "localhost",
        "10.0.0.4:1",
        "tcp://10.0.0.4",
        "é" * 300,
        "(",
        "a(b)",
    ),
    ["http://h:1", "http://h:1/"],
]
OTHERS: list[Any] = [
    None,
    True,
    False,
    [],
    {},
    [None],
    [[]],
    [True],
    [-1],
    [0],
    [299],
    [300],
    [0, 0],
    [2**70],
    [1.5],
    ["x"],
    [""],
    {"a": 1},
]
EXTREMES = [*NUMBERS, *FLOATS, *TEXTS, *OTHERS]


def leaves() -> Iterator[tuple[str, str, FieldInfo]]:
    for group, field in Config.model_fields.items():
        for leaf, leaf_field in field.annotation.model_fields.items():
            yield group, leaf, leaf_field


def planned(changes: dict[str, dict[str, Any]], tmp_path: Path) -> tuple[Config, Plan]:
    """As `chord-megatron validate` does it, from a file."""
    merged = {group: {**BASE.get(group, {}), **changes.get(group, {})} for group in {*BASE, *changes}}
    path = tmp_path / "config.yaml"
    path.write_text(write_yaml(merged), encoding="utf-8")
    config = load_config(path)
    plan = make_plan(config, ARCH, 4)
    assert fullest_rank(config, ARCH, plan, layers="local").step_in_words
    return config, plan


def check_it_computes(config: Config) -> None:
    """What a run would do with the numbers later, on tensors of a few tokens: nothing raises, nothing overflows."""
    rollout, train, optimizer = config.rollout, config.train, config.optimizer
    logits = torch.tensor([[300.0, -300.0, 0.5, 0.25]])
    for temperature in (rollout.temperature, train.eval_temperature):
        uniforms = torch.tensor([0.3], dtype=torch.float64)
        sample_tokens(logits, uniforms, temperature=temperature, top_p=rollout.top_p, top_k=rollout.top_k)
        assert torch.full((1,), temperature).isfinite().all()
        assert config.rollout.engine != "vllm" or temperature <= 2
    for seed in (train.seed, 2 * train.seed + 1, train.seed + 2718 + 100 * 64):  # Megatron-Core's own offsets
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
    torch.randperm(3, generator=torch.Generator().manual_seed(train.seed + train.train_iters))
    seed_number((train.seed, train.train_iters, 0))
    for seconds in (config.rewards.timeout_seconds, rollout.vllm_server_timeout):
        timedelta(seconds=seconds)
        httpx.Timeout(seconds)
        assert 0 < seconds * 1000 < 2**31  # what poll() takes
    for url in rollout.vllm_servers or ():
        assert httpx.URL(url).host and (urlsplit(url).port or 80) > 0
    sources = [source.path for source in sources_of(config.data.dataset)]
    for text in (config.model.path, *sources, train.output_dir, rollout.weight_transfer_dir):
        Path(text).exists()
    weight = torch.nn.Parameter(torch.ones(3))
    adam = torch.optim.AdamW(
        [weight],
        lr=optimizer.lr,
        betas=(optimizer.adam_beta1, optimizer.adam_beta2),
        eps=optimizer.adam_eps,
        weight_decay=optimizer.weight_decay,
    )
    weight.grad = torch.tensor([0.0, 1e-3, -1.0])
    adam.step()
    assert weight.isfinite().all()
    assert all(0 <= mu_at(config, step) <= 1 for step in (0, 1, train.train_iters - 1))
    sample = TrainingSample(
        tokens=torch.tensor([1, 2, 3]),
        loss_mask=torch.tensor([False, True, True]),
        is_expert=False,
        temperature=rollout.temperature,
        advantage=1.0,
        rollout_log_probs=torch.tensor([0.0, -1.0, -2.0]),
        old_log_probs=torch.tensor([0.0, -1.5, -2.0]),
        ref_log_probs=torch.tensor([0.0, -1.5, -2.0]),
    )
    plan = Plan(1, 1, 1, train.global_batch_size, 1, 1, 1, 1)
    batch = build_global_batch(
        [sample],
        BatchLayout(),
        micro_batch_size=1,
        rollout_mean=build_means(config, plan)[0],
    )
    log_probs = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    objective = build_objective(config.grpo, config.chord)
    result = chord_loss(log_probs, torch.ones(3), batch.micro_batches[0], objective=objective, mu=0.5)
    assert result.loss.isfinite()


@pytest.mark.parametrize(("group", "leaf"), [(group, leaf) for group, leaf, _ in leaves()])
def test_an_extreme_of_a_key_computes_or_is_refused(group: str, leaf: str, tmp_path: Path):
    beside = {"rollout": BESIDE[leaf]} if leaf in BESIDE else {}
    for value in EXTREMES:
        changes = {**beside, group: {**beside.get(group, {}), leaf: value}}
        try:
            config, _ = planned(changes, tmp_path)
        except UserError as error:
            message = str(error)
            assert len(message) < 1000 and "\n" not in message, message
            continue
        check_it_computes(config)


NUMERIC = [
    (group, leaf) for group, leaf, field in leaves() if {int, float} & {*get_args(field.annotation), field.annotation}
]


@given(st.data())
@settings(derandomize=True, max_examples=150, deadline=None)
def test_extremes_of_several_keys_compute_or_are_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    picked = data.draw(st.lists(st.sampled_from(NUMERIC), min_size=2, max_size=4, unique=True))
    changes: dict[str, dict[str, Any]] = {}
    for group, leaf in picked:
        values = st.sampled_from(NUMBERS + FLOATS) | st.integers(0, 64) | st.floats(0, 2)
        changes.setdefault(group, {})[leaf] = data.draw(values)
    try:
        config, _ = planned(changes, tmp_path_factory.getbasetemp())
    except UserError:
        return
    check_it_computes(config)


# Key, value, and the sentence.
SENTENCES: list[tuple[str, Any, str]] = [
    (
        "parallel.pipeline_layout",
        "even",
        "parallel.pipeline_layout='even': must be auto or the layers of each stage, such as [3, 4, 4, 2]",
    ),
    (
        "parallel.pipeline_layout",
        [5, -1],
        "parallel.pipeline_layout=[5, -1]: must be auto or the layers of each stage, such as [3, 4, 4, 2]",
    ),
    ("train.seed", 2**31, "train.seed=2147483648: must be at most 2147483647"),
    ("train.train_iters", True, "train.train_iters=True: must be an integer, without quotes"),
    ("train.train_iters", "12", "train.train_iters='12': must be an integer, without quotes"),
    ("train.train_iters", 12.0, "train.train_iters=12.0: must be an integer, without quotes"),
    ("train.train_iters", None, "train.train_iters=None: must be an integer, without quotes"),
    ("train.output_dir", "", "train.output_dir='': must not be empty"),
    ("train.output_dir", "a\0b", "train.output_dir='a\\x00b': must be text without NUL and halves of characters"),
    ("data.dataset_split", False, "data.dataset_split=False: must be text; put it in quotes"),
    ("data.dataset_split", 7, "data.dataset_split=7: must be text; put it in quotes"),
    (
        "grpo.kl_estimator",
        "k4",
        "grpo.kl_estimator='k4': must be 'k1', 'k2' or 'k3'",
    ),
    (
        "model.recompute",
        1,
        "model.recompute=1: must be true, false, full, or a list of modules such as [core_attn, mlp]",
    ),
    (
        "model.recompute",
        ["core_atn"],
        "model.recompute=['core_atn']: 'core_atn' is no module; did you mean 'core_attn'?",
    ),
    (
        "model.recompute",
        ["x"],
        "model.recompute=['x']: 'x' is no module; choose among core_attn, mlp, layernorm, mla_up_proj, moe, moe_act, "
        "shared_experts",
    ),
    (
        "model.recompute",
        ["mlp", "moe"],
        "model.recompute names moe, but the model has no experts; remove it from the list",
    ),
    (
        "model.recompute",
        ["mla_up_proj"],
        "model.recompute names mla_up_proj, but the model has no latent attention; remove it from the list",
    ),
    (
        "model.recompute_num_layers",
        2,
        "model.recompute_num_layers=2 is for model.recompute=full, whole layers; remove it or set that",
    ),
    (
        "data.reference_pattern",
        "(",
        "data.reference_pattern='(': must be a regular expression (missing ), unterminated subpattern at position 0)",
    ),
    ("data.reference_pattern", "1", r"data.reference_pattern='1': must have a group, as in '####\s*(.+)'"),
    ("optimizer.lr", "x", "optimizer.lr='x': must be a number, without quotes"),
    ("optimizer.lr", math.inf, "optimizer.lr=inf: must be a finite number"),
    ("optimizer.adam_beta1", 1.0, "optimizer.adam_beta1=1.0: must be below 1"),
    ("optimizer.adam_eps", 0, "optimizer.adam_eps=0: must be at least 1e-30"),
    ("rollout.temperature", 1e-30, "rollout.temperature=1e-30: must be at least 0.01"),
    ("rollout.stop_token_ids", [], "rollout.stop_token_ids=[]: must not be empty"),
    ("rollout.stop_token_ids", [-1], "rollout.stop_token_ids.0=-1: must be at least 0"),
    ("rewards.reward_funcs", "accuracy", "rewards.reward_funcs='accuracy': must be a list, such as [a, b]"),
    ("rewards.reward_funcs", [], "rewards.reward_funcs=[]: must not be empty"),
    ("rewards.timeout_seconds", 1e7, "rewards.timeout_seconds=10000000.0: must be at most 1000000"),
    (
        "rollout.stop_token_ids",
        [99999, 5],
        "rollout.stop_token_ids: 99999 is not one of the model's 300 tokens; name tokens below 300, or null for the "
        "tokenizer's end tokens",
    ),
    (
        "train.eval_temperature",
        1e-9,
        "train.eval_temperature=1e-09: must be 0 (greedy) or at least 0.01",
    ),
    (
        "rollout.num_generations",
        1,
        "rollout.num_generations=1 gives every completion the advantage 0, so that nothing is learnt from rollouts; "
        "set it to 2 or more, or for supervised training alone chord.chord_mu_peak=1 and chord.chord_mu_valley=1",
    ),
    (
        "data.max_prompt_length",
        2000,
        "data.max_prompt_length + rollout.max_completion_length = 2000 + 256 = 2256 tokens, but the model reads 2048; "
        "set data.max_prompt_length to at most 1792",
    ),
    (
        "rollout.max_completion_length",
        2048,
        "rollout.max_completion_length=2048 leaves no room for a prompt in the 2048 tokens that the model reads; lower "
        "it",
    ),
    (
        "chord.chord_sft_max_length",
        2049,
        "chord.chord_sft_max_length=2049, but the model reads 2048 tokens; lower it, or set it to null",
    ),
    (
        "train.global_batch_size",
        36,
        "train.global_batch_size=36 completions is not a multiple of rollout.num_generations=8, and every prompt needs "
        "its whole group; set train.global_batch_size to 32 or 48",
    ),
    (
        "train.micro_batch_size",
        3,
        "train.global_batch_size=32 is not a multiple of train.micro_batch_size x data-parallel size = 3 x 4 = 12; set "
        "train.global_batch_size to 24 or 48",
    ),
]


@pytest.mark.parametrize(("key", "value", "sentence"), SENTENCES)
def test_a_refusal_names_key_value_and_remedy(key: str, value: Any, sentence: str, tmp_path: Path):
    group, leaf = key.split(".")
    with pytest.raises(UserError) as error:
        planned({group: {leaf: value}}, tmp_path)
    assert str(error.value) == sentence
