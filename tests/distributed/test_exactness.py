"""Loss and gradient norm of the same rollouts are the same under every layout, and those of a float64 reference.

One recording is replayed by whole training runs of three steps; what is compared is their metrics.jsonl.
"""

from __future__ import annotations

import json
import random
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from forked import launch
from selection import selected
from transformers import Qwen2Config, Qwen2ForCausalLM

from chord_megatron.config import Config

pytestmark = pytest.mark.distributed

HERE = Path(__file__).parent
QUICKSTART = HERE.parents[1] / "examples" / "quickstart" / "make_quickstart.py"
HASH_REWARD = f"{HERE / 'hash_reward.py'}:hash_reward"
NUM_PROMPTS, NUM_EXPERTS = 5, 7  # 6 and 9 are read: both streams go on into a second epoch
STEPS = 3

# Relative errors at the first step and at the next two, whose weights already differ by rounding. Measured: at
# most 3e-7 and 4e-6.
TOLERANCES = (1e-6, 1e-5, 1e-5, 1e-5)
SMALLEST_LOSS = 0.1  # the losses of on-policy groups may cancel

# Three steps on one generation batch.
OFF_POLICY = {"chord.chord_mu_valley": 0.4, "grpo.num_iterations": STEPS, "optimizer.lr": 5e-4}

# Twice over a generation batch of two steps: the first step has no old log-probs, the second those of a pass before it,
# the third those of the first step itself.
IN_TWOS = {"grpo.steps_per_generation": 2, "grpo.num_iterations": 2, "train.train_iters": 4}

# Each with a term or a bound of its own.
POLICY_LOSSES: dict[str, dict[str, Any]] = {
    "cispo, entropy bonus": {
        **OFF_POLICY,
        "grpo.loss_type": "cispo",
        "grpo.epsilon_high": 1.01,
        "grpo.entropy_coef": 0.1,
    },
    "sapo, off-policy mask": {**OFF_POLICY, "grpo.loss_type": "sapo", "grpo.off_policy_sequence_mask_delta": 0.001},
    "GSPO, k2": {
        **OFF_POLICY,
        "grpo.loss_type": "grpo",
        "grpo.importance_sampling_level": "sequence",
        "grpo.epsilon": 3e-3,
        "grpo.beta": 0.1,
        "grpo.kl_estimator": "k2",
    },
    "GSPO-token, dr_grpo": {
        **OFF_POLICY,
        "grpo.loss_type": "dr_grpo",
        "grpo.importance_sampling_level": "sequence_token",
        "grpo.epsilon": 3e-3,
        "grpo.epsilon_high": 4e-3,
    },
    "luspo": {
        **OFF_POLICY,
        "grpo.loss_type": "luspo",
        "grpo.importance_sampling_level": "sequence",
        "grpo.epsilon": 3e-3,
    },
    "bnpo, delta": {**OFF_POLICY, "grpo.loss_type": "bnpo", "grpo.epsilon": 0.005, "grpo.delta": 1.01},
    "gpg, KL in the reward": {
        **OFF_POLICY,
        "grpo.num_iterations": 1,
        "grpo.loss_type": "gpg",
        "grpo.beta": 0.5,
        "grpo.kl_in_reward": True,
    },
    "two steps a generation": {
        **OFF_POLICY,
        **IN_TWOS,
        "grpo.loss_type": "grpo",
        "grpo.epsilon": 0.02,
        "rollout.replay_from": "twos.jsonl",
    },
    # The sampler's temperature was another: already the first ratios are far from 1.
    "the sampler's old log-probs": {
        **OFF_POLICY,
        "grpo.old_log_probs": "sampler",
        "rollout.temperature": 0.6,
        "grpo.loss_type": "grpo",
        "grpo.beta": 0.1,
        "grpo.kl_in_reward": True,
    },
    "gmpo": {**OFF_POLICY, "grpo.loss_type": "gmpo", "grpo.epsilon": 0.01},
    "vespo": {**OFF_POLICY, "grpo.loss_type": "vespo"},
    "top entropy": {**OFF_POLICY, "grpo.top_entropy_quantile": 0.3, "grpo.beta": 0.1},
}

# What an advantage is, and what an expert token weighs: one of each in a case.
ADVANTAGES_AND_WEIGHTS: dict[str, dict[str, Any]] = {
    "RLOO over the batch, p": {
        "chord.chord_mu_valley": 0.4,
        "grpo.advantage_estimator": "rloo",
        "grpo.scale_rewards": "batch",
        "chord.expert_weight": "probability",
    },
    "REINFORCE++, LUFFY": {
        "chord.chord_mu_valley": 0.4,
        "grpo.advantage_estimator": "reinforce_plus_plus",
        "chord.expert_weight": "luffy",
        "chord.luffy_gamma": 0.05,
    },
    "OPO, SRFT": {
        "chord.chord_mu_valley": 0.4,
        "grpo.advantage_estimator": "opo",
        "chord.expert_weight": "entropy",
    },
    "pass@k, phi with a cutoff": {
        "chord.chord_mu_valley": 0.4,
        "grpo.advantage_estimator": "pass_at_k",
        "chord.expert_weight": "phi",
        "chord.expert_weight_cutoff": 0.03,
    },
    "GDPO, answers in parts": {
        "chord.chord_mu_valley": 0.4,
        "chord.chord_sft_dataset": "parts.jsonl",
        "grpo.scale_rewards": "gdpo",
        "rewards.reward_funcs": [HASH_REWARD, "soft_overlong"],
        "rewards.reward_weights": [1.0, 0.5],
        "rewards.soft_cache_length": 20,
    },
    "missing rewards, a weight of one's own": {
        "chord.chord_mu_valley": 0.4,
        "rewards.reward_funcs": [f"{HERE / 'hash_reward.py'}:now_and_then"],
        "rewards.on_error": "leave_out",
        "chord.expert_weight": f"{HERE / 'own_weight.py'}:unsure",
    },
    # Nothing of the rollouts is learnt, and the experts are.
    "no rewards": {
        "chord.chord_mu_valley": 0.4,
        "rewards.reward_funcs": [f"{HERE / 'hash_reward.py'}:never"],
        "rewards.on_error": "leave_out",
    },
}

# The share of the experts, the losses and the models.
CASES: dict[str, dict[str, Any]] = {
    "mu 0": {"chord.chord_mu_valley": 0.0},
    "mu 1": {"chord.chord_mu_valley": 1.0},
    "mu 0.4": {"chord.chord_mu_valley": 0.4},
    "mu 0.4, phi": {"chord.chord_mu_valley": 0.4, "chord.chord_enable_phi_function": True},
    # Three steps on one generation batch: ratios leave 1, some are clipped, and the penalty is not zero.
    "off-policy": {
        "chord.chord_mu_peak": 0.9,
        "chord.chord_mu_valley": 0.1,
        "chord.chord_mu_decay_steps": STEPS,
        "chord.chord_enable_phi_function": True,
        "grpo.num_iterations": STEPS,
        "grpo.epsilon": 0.02,
        "grpo.epsilon_high": 0.03,
        "grpo.beta": 0.1,
        "grpo.loss_type": "grpo",
        "optimizer.weight_decay": 0.1,
        "optimizer.clip_grad": 0.3,
    },
    # The trainer's temperature is not the sampler's: completions are masked, the others weighted, the penalty is not.
    "sequence mask": {
        "chord.chord_mu_valley": 0.4,
        "rollout.temperature": 0.6,
        "grpo.num_iterations": STEPS,
        "grpo.beta": 0.1,
        "grpo.rollout_importance_sampling_mode": "sequence_mask",
        "grpo.rollout_importance_sampling_threshold": 1.01,
        "optimizer.lr": 2e-4,  # a larger step makes e^d of the penalty large, and rounding with it
    },
    **ADVANTAGES_AND_WEIGHTS,
    **POLICY_LOSSES,
    # Qwen2 has biases on query, key and value; the first and the last stage share the embedding.
    "tied Qwen2": {"model.path": "tied", "chord.chord_mu_valley": 0.4},
    # A tied one, too, which neither 3 nor 4 stages divide.
    "five layers": {"model.path": "five", "chord.chord_mu_valley": 0.4},
}

TP_2 = {"parallel.tensor_model_parallel_size": 2}
PP_2 = {"parallel.pipeline_model_parallel_size": 2}
VPP_2 = {"parallel.virtual_pipeline_model_parallel_size": 2}
CP_2 = {"parallel.context_parallel_size": 2}
SHUFFLED = {"train.packing_order": "shuffled"}


BY_ITSELF = {"train.share_prompts": False}


def budget(tokens: int) -> dict[str, Any]:
    return {"train.max_tokens_per_micro_batch": tokens}


def micro_batch(size: int) -> dict[str, Any]:
    return {"train.micro_batch_size": size}


BASELINE = "TP 1"
# Processes and settings.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    BASELINE: (1, {}),
    "TP 1, micro-batch 1": (1, micro_batch(1)),
    "TP 1, micro-batch 4": (1, micro_batch(4)),
    "TP 1, shuffled": (1, SHUFFLED),
    "TP 1, 64 tokens": (1, budget(64)),
    "TP 1, 1000 tokens": (1, budget(1000)),
    "TP 1, idle rows run": (1, {"train.skip_idle_rows": False}),
    "TP 1, micro-batch 8": (1, micro_batch(8)),
    "TP 1, micro-batch 8, each row by itself": (1, {**BY_ITSELF, **micro_batch(8)}),
    "TP 2": (2, TP_2),
    "TP 2 + SP": (2, {**TP_2, "parallel.sequence_parallel": True}),
    "TP 2 + SP, micro-batch 8": (2, {**TP_2, "parallel.sequence_parallel": True, **micro_batch(8)}),
    "PP 2": (2, PP_2),
    "PP 2 x VPP 2": (2, {**PP_2, **VPP_2}),
    # Four layers, or five, cut by what they cost; and a first chunk that is the embedding alone.
    "PP 3": (3, {"parallel.pipeline_model_parallel_size": 3}),
    "PP 2 x VPP 2, uneven": (2, {**PP_2, **VPP_2, "parallel.pipeline_layout": [0, 2, 1, 1]}),
    "DP 2": (2, {}),
    "DP 2, micro-batch 4, shuffled": (2, {**micro_batch(4), **SHUFFLED}),
    "DP 2, 100 tokens": (2, budget(100)),
    "DP 2, 100 tokens, each row by itself": (2, {**BY_ITSELF, **budget(100)}),
    "PP 2 x VPP 2, 100 tokens": (2, {**PP_2, **VPP_2, **budget(100)}),
    "DP 2, distributed optimizer": (2, {"optimizer.use_distributed_optimizer": True}),
    "DP 2, overlapped gradient sums": (2, {"optimizer.overlap_grad_reduce": True, **micro_batch(1)}),
    "TP 2 x PP 2": (4, {**TP_2, **PP_2}),
    # Packs of sequences of any length: chunks that end in padding, and chunks of padding alone.
    "CP 2": (2, {**CP_2, **micro_batch(4)}),
    "CP 2 x TP 2 + SP": (4, {**CP_2, **TP_2, "parallel.sequence_parallel": True}),
    "CP 2 x PP 2": (4, {**CP_2, **PP_2}),
    "CP 2 x DP 2, distributed optimizer, 100 tokens": (
        4,
        {**CP_2, "optimizer.use_distributed_optimizer": True, **budget(100)},
    ),
    "CP 4": (4, {"parallel.context_parallel_size": 4}),
    "CP 2 x TP 2 x PP 2 x VPP 2": (8, {**CP_2, **TP_2, **PP_2, **VPP_2}),
}
LONG_LAYOUTS = ("CP 2 x DP 2, distributed optimizer, 100 tokens", "CP 4", "CP 2 x TP 2 x PP 2 x VPP 2")
# Where completions are sampled too; the other settings do not reach the sampler.
SAMPLING_LAYOUTS = (
    *(BASELINE, "TP 2", "TP 2 + SP", "PP 2", "PP 2 x VPP 2", "PP 3", "PP 2 x VPP 2, uneven", "DP 2", "TP 2 x PP 2"),
    *("CP 2", "CP 2 x PP 2"),
)
SAMPLED = "sampled"  # "mu 0.4" with rollouts drawn under the layout and recorded
SAMPLED_IN_TWOS = "sampled in twos"  # the same with two steps a generation, for the case that replays them

# Every case runs at two layouts, and three under all that they are for, which between them have all terms of the loss,
# both kinds of head and uneven pipelines; but for LONG_LAYOUTS. `make test-all` adds the others, except where they
# would add nothing.
EVERYWHERE, EVERY_CASE_AT = ("off-policy", "tied Qwen2", "five layers"), (BASELINE, "DP 2, micro-batch 4, shuffled")
MATRIX = (
    *EVERY_CASE_AT,
    "TP 1, micro-batch 1",
    "TP 1, micro-batch 4",
    "TP 1, shuffled",
    "TP 2",
    "PP 2",
    "DP 2",
    "CP 2",
)
LAYOUTS_OF = {
    "sequence mask": (*EVERY_CASE_AT, "TP 2", "PP 2", "DP 2", "CP 2"),
    **dict.fromkeys(POLICY_LOSSES, MATRIX),
    **dict.fromkeys(ADVANTAGES_AND_WEIGHTS, MATRIX),
    "no rewards": (*EVERY_CASE_AT, "DP 2"),
    "five layers": (BASELINE, "PP 3", "PP 2 x VPP 2"),
}


def in_short(layout: str, case: str) -> bool:
    return layout in EVERY_CASE_AT or (case in EVERYWHERE and layout not in LONG_LAYOUTS)


PAIRS = [
    pytest.param(layout, case, marks=() if in_short(layout, case) else pytest.mark.slow)
    for layout in LAYOUTS
    for case in CASES
    if layout in LAYOUTS_OF.get(case, LAYOUTS)
]

# What a bound does at the last step: something, and not to every token.
BETWEEN_0_AND_1 = {
    "cispo, entropy bonus": ("clip_fraction_high",),
    "sapo, off-policy mask": ("off_policy_masked_fraction",),
    "GSPO, k2": ("clip_fraction_low", "clip_fraction_high"),
    "GSPO-token, dr_grpo": ("clip_fraction_low", "clip_fraction_high"),
    "luspo": ("clip_fraction_low", "clip_fraction_high"),
    "bnpo, delta": ("clip_fraction_low", "clip_fraction_high"),
    "two steps a generation": ("clip_fraction_low", "clip_fraction_high"),
    "the sampler's old log-probs": ("clip_fraction_low", "clip_fraction_high"),
    "gmpo": ("clip_fraction_low", "clip_fraction_high"),
}

Configs = dict[tuple[str, str], Config]  # by layout and case


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's model and task, smaller, and a tied Qwen2 with the same tokenizer."""
    root = tmp_path_factory.mktemp("exactness")
    make = runpy.run_path(str(QUICKSTART))
    problems = make["sample_problems"](random.Random(0), NUM_PROMPTS + NUM_EXPERTS)
    make["write_jsonl"](root / "prompts.jsonl", make["prompt_rows"](problems[:NUM_PROMPTS]))
    experts = [*make["expert_rows"](problems[NUM_PROMPTS:])]
    make["write_jsonl"](root / "experts.jsonl", experts)
    make["write_jsonl"](root / "parts.jsonl", [{**row, "answer": in_parts(row["answer"])} for row in experts])
    torch.manual_seed(0)
    tokenizer = make["build_tokenizer"]()
    model = make["build_model"](tokenizer)
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    keys += ("num_key_value_heads", "max_position_embeddings", "initializer_range", "eos_token_id", "pad_token_id")
    sizes = {key: getattr(model.config, key) for key in keys}
    tied = tied_model(**sizes)

    def save(name: str, built: Qwen2ForCausalLM) -> None:
        # Zero at first too, and the norm of a zero vector has a slope of 1/sqrt(eps).
        torch.nn.init.normal_(built.get_input_embeddings().weight[tokenizer.pad_token_id], std=0.05)
        built.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)

    save("model", model)
    save("tied", tied)
    # Last: what it draws must not change the others, whose completions the cases were chosen for.
    save("five", tied_model(**{**sizes, "num_hidden_layers": 5}))
    return root


def tied_model(**sizes: Any) -> Qwen2ForCausalLM:
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, bos_token_id=None, tie_word_embeddings=True)).float()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero at first
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def in_parts(answer: str) -> list[tuple[str, float]]:
    """Three, of which the second is not learnt."""
    first, second = len(answer) // 3, 2 * len(answer) // 3
    return [(answer[:first], 0.5), (answer[first:second], 0.0), (answer[second:], 2.0)]


def make_config(assets: Path, name: str, settings: dict[str, Any]) -> Config:
    """The configuration of a run; `settings` are dotted keys."""
    model = assets / settings.get("model.path", "model")
    flat = {
        "model.dtype": "float32",
        "data.dataset": str(assets / "prompts.jsonl"),
        "data.max_prompt_length": 16,
        "rewards.reward_funcs": [HASH_REWARD],
        "rollout.num_generations": 4,
        "rollout.max_completion_length": 24,
        "rollout.temperature": 0.8,
        "chord.chord_sft_global_batch_size": 3,  # neither DP nor the micro-batches divide 8 + 3 rows
        "chord.chord_sft_max_length": 64,
        "optimizer.lr": 1e-3,
        "train.global_batch_size": 8,
        "train.micro_batch_size": 2,
        "train.train_iters": STEPS,
        "train.output_dir": str(assets / "runs" / name),
        "tracking.report_to": [],
        **settings,
        "model.path": str(model),
        "chord.chord_sft_dataset": str(assets / settings.get("chord.chord_sft_dataset", "experts.jsonl")),
    }
    nested: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        group, leaf = key.split(".")
        nested.setdefault(group, {})[leaf] = value
    return Config.model_validate(nested)


def make_configs(assets: Path, layout: str, cases: list[str]) -> Configs:
    """All runs under a layout; those that sample come first."""
    _, settings = LAYOUTS[layout]
    settings_of = {
        case: {
            **CASES[case],
            "rollout.engine": "replay",
            "rollout.replay_from": str(assets / CASES[case].get("rollout.replay_from", f"{BASELINE}.jsonl")),
        }
        for case in cases
    }
    if layout == BASELINE:
        record = {"rollout.record_to": str(assets / "twos.jsonl")}
        settings_of = {SAMPLED_IN_TWOS: {**CASES["mu 0.4"], **IN_TWOS, **record}, **settings_of}
    if layout in SAMPLING_LAYOUTS:
        record = {"rollout.record_to": str(assets / f"{layout}.jsonl")}
        settings_of = {SAMPLED: {**CASES["mu 0.4"], **record}, **settings_of}
    return {
        (layout, case): make_config(assets, f"{layout}, {case}", {**settings, **objective})
        for case, objective in settings_of.items()
    }


@pytest.fixture(scope="module")
def runs(assets: Path, request: pytest.FixtureRequest) -> Configs:
    """Every run that the selected tests ask for, done. Layouts of as many processes share a launch."""
    wanted = selected(request, "layout", "case")
    runs: Configs = {}
    for processes in sorted({count for count, _ in LAYOUTS.values()}):
        configs: Configs = {}
        for layout in LAYOUTS:
            if LAYOUTS[layout][0] == processes:
                cases = list(CASES) if layout == BASELINE else [case for case in CASES if (layout, case) in wanted]
                configs |= make_configs(assets, layout, cases)
        if not configs:
            continue
        path = assets / f"{processes}.json"
        path.write_text(json.dumps([config.model_dump() for config in configs.values()]), encoding="utf-8")
        launch(HERE / "exactness_worker.py", path, processes=processes)
        runs |= configs
    return runs


@pytest.fixture(scope="module")
def references(runs: Configs) -> dict[str, list[reference.Step]]:
    """The float64 steps of each case."""
    return {case: reference.train(runs[BASELINE, case]) for case in CASES}


@pytest.mark.parametrize(("layout", "case"), PAIRS)
def test_loss_and_grad_norm_are_exact(
    layout: str,
    case: str,
    runs: Configs,
    references: dict[str, list[reference.Step]],
    measure: Callable[[str, float], None],
) -> None:
    steps = logged_steps(runs[layout, case])
    from_baseline = relative_errors(steps, logged_steps(runs[BASELINE, case]))
    from_reference = relative_errors(steps, references[case])
    for source, errors in ((BASELINE, from_baseline), ("float64", from_reference)):
        for step, error in enumerate(errors):
            measure(f"loss and gradient norm of step {step}, {layout} from {source}", error)
        assert all(error <= bound for error, bound in zip(errors, TOLERANCES)), (source, errors)


@pytest.mark.parametrize("layout", SAMPLING_LAYOUTS)
def test_one_seed_draws_the_same_completions(layout: str, runs: Configs) -> None:
    wanted, actual = recorded(runs[BASELINE, SAMPLED]), recorded(runs[layout, SAMPLED])
    assert len({sum(rollout["response_mask"]) for rollout in wanted}) > 4
    assert {rollout["finish_reason"] for rollout in wanted} == {"stop", "length"}
    assert [rollout["tokens"] for rollout in actual] == [rollout["tokens"] for rollout in wanted]
    for ours, theirs in zip(actual, wanted):
        assert ours["rollout_log_probs"] == pytest.approx(theirs["rollout_log_probs"], abs=1e-5)


@pytest.mark.parametrize("layout", SAMPLING_LAYOUTS)
def test_sampler_and_trainer_have_the_same_log_probs(layout: str, runs: Configs) -> None:
    assert max(line["log_prob_diff_max"] for line in metrics(runs[layout, SAMPLED])) <= 1e-5


@pytest.mark.parametrize("case", CASES)
def test_the_case_is_not_trivial(case: str, runs: Configs) -> None:
    """What the comparisons rest on: the weights move, rewards differ, ratios are clipped."""
    lines = metrics(runs[BASELINE, case])
    assert len({line["loss"] for line in lines}) == len(lines) >= STEPS
    if case not in ("mu 1", "no rewards"):
        assert all(line["reward_std"] > 0.1 and line["zero_std_fraction"] < 1 for line in lines)
    if case == "off-policy":
        assert 0 < lines[-1]["clip_fraction"] < 1 and lines[-1]["kl"] > 0
    if case in POLICY_LOSSES:
        assert len({line["loss_rollout"] for line in lines}) == len(lines)
        for key in BETWEEN_0_AND_1.get(case, ()):
            assert 0 < lines[-1][key] < 1, key
        assert ("grpo.beta" in CASES[case]) == bool(lines[-1]["kl"])
    if case == "sequence mask":
        assert all(0 < line["importance_clipped_fraction"] < 1 for line in lines)
        assert all(line["effective_sample_size"] < 0.99 for line in lines)
    if case.startswith("missing rewards"):
        assert all(0 < line["unscorable_completions"] < 8 for line in lines)
    if case.startswith("GDPO"):
        assert all(-1 < line["reward/soft_overlong"] < 0 for line in lines)
        whole = metrics(runs[BASELINE, "mu 0.4"])
        assert all(line["num_expert_tokens"] < other["num_expert_tokens"] for line, other in zip(lines, whole))


def metrics(config: Config) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return reference.read_jsonl(Path(config.train.output_dir) / "metrics.jsonl")


def logged_steps(config: Config) -> list[reference.Step]:
    """What a run logged of its steps."""
    return [reference.Step(line["loss"], line["grad_norm"]) for line in metrics(config)]


def recorded(config: Config) -> list[dict[str, Any]]:
    """The completions that a run recorded, in order."""
    return sorted(reference.read_jsonl(config.rollout.record_to), key=lambda r: (r["step"], r["sample_index"]))


def relative_errors(steps: list[reference.Step], expected: list[reference.Step]) -> list[float]:
    """The larger of the errors of loss and gradient norm, of each step."""
    return [
        max(
            abs(step.loss - wanted.loss) / max(abs(wanted.loss), SMALLEST_LOSS),
            abs(step.grad_norm - wanted.grad_norm) / wanted.grad_norm,
        )
        for step, wanted in zip(steps, expected, strict=True)
    ]
