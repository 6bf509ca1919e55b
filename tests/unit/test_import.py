"""Scripts of other trainers as configurations: every value by hand, every flag known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from flags_of_trainers import MS_SWIFT, MS_SWIFT_IN_SCRIPTS, TRAINING_ARGUMENTS, TRL, VERL
from typer.testing import CliRunner

from chord_megatron.cli.main import app
from chord_megatron.config import Config, known_keys
from chord_megatron.importers import ms_swift, trl, verl_keys
from chord_megatron.importers.importing import import_words
from chord_megatron.importers.recipe import Recipe
from chord_megatron.planning.plan import make_plan
from chord_megatron.system.errors import UserError
from chord_megatron.system.yaml_text import read_yaml
from chord_megatron.weights.hf_config import parse_config

EXAMPLE = Path(__file__).parents[2] / "examples" / "ms_swift_chord"
CHORD = (EXAMPLE / "chord.sh").read_text(encoding="utf-8")
SYSTEM = "Solve the problem. Reason first, between <think> and </think>.\nThen give the final answer in \\boxed{}."
CHORD_CONFIG = {
    "model": {"path": "Qwen/Qwen2.5-7B-Instruct", "dtype": "bfloat16", "recompute": True},
    "data": {
        "dataset": "AI-MO/NuminaMath-TIR",
        "prompt_column": "problem",
        "reference_column": "solution",
        "system_prompt": SYSTEM,
        "max_prompt_length": 4096,
        "on_bad_row": "skip",
    },
    "rewards": {"reward_funcs": ["accuracy"]},
    "rollout": {
        "engine": "vllm",
        "num_generations": 8,
        "temperature": 0.9,
        "max_completion_length": 4096,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": 0.4,
        "sleep_level": 1,
        "offload_optimizer": True,
        "offload_model": True,
    },
    "grpo": {"loss_type": "grpo", "beta": 0.0, "overlong_filter": True},
    "chord": {
        "semantics": "ms-swift",
        "chord_sft_dataset": "AI-MO/NuminaMath-TIR",
        "chord_sft_prompt_column": "problem",
        "chord_sft_answer_column": "solution",
        "chord_sft_global_batch_size": 64,
        "chord_mu_peak": 0.9,
        "chord_mu_valley": 0.05,
        "chord_mu_warmup_steps": 0,
        "chord_mu_decay_steps": 200,
        "chord_enable_phi_function": False,
    },
    "optimizer": {
        "lr": 1e-6,
        "lr_decay_style": "cosine",
        "lr_warmup_ratio": 0.05,
        "weight_decay": 0.1,
        "use_distributed_optimizer": True,
    },
    "train": {
        "output_dir": "output/Qwen2.5-7B-Instruct",
        "micro_batch_size": 4,
        "global_batch_size": 256,
        "num_train_epochs": 1.0,
        "seed": 42,
        "save_steps": 1000,
        "save_total_limit": 2,
    },
    "tracking": {"report_to": ["tensorboard"], "log_completions": 8},
}


ARCH = parse_config(
    {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
    }
)


def check_plan(recipe: Recipe) -> None:
    """The rules across keys, as `validate` applies them to a model of this shape."""
    make_plan(Config.model_validate(recipe.groups()), ARCH, recipe.world_size)


def recipe_of(trainer: str, script: str, tmp_path: Path, *more: str) -> Recipe:
    path = tmp_path / "train.sh"
    path.write_text(script, encoding="utf-8")
    return import_words(trainer, [str(path), *more])


def test_the_reference_script_of_chord(tmp_path: Path):
    recipe = recipe_of("ms-swift", CHORD, tmp_path)
    expected = {**CHORD_CONFIG, "tracking": {"report_to": ["tensorboard", "swanlab"], "log_completions": 8}}
    assert recipe.groups() == expected
    assert (recipe.nproc_per_node, recipe.nnodes) == (8, 1)
    kinds = {remark.kind for remark in recipe.remarks}
    assert kinds == {"hardware"}
    check_plan(recipe)


def test_its_yaml_reads_back_and_says_where_each_key_is_from(tmp_path: Path):
    recipe = recipe_of("ms-swift", CHORD, tmp_path)
    text = recipe.to_yaml()
    assert read_yaml(text) == recipe.groups()
    assert "#   chord-megatron train THIS_FILE.yaml --nproc-per-node 8" in text
    assert "  beta: 0.0  # --beta 0.0" in text.splitlines()
    assert "  global_batch_size: 256  # per device 4 x 8 accumulated x 8 processes" in text.splitlines()
    assert "  temperature: 0.9  # --temperature, the default there" in text.splitlines()
    assert "#   --logging_steps 1: each step is logged" in text.splitlines()


def test_the_recipe_is_what_the_importer_makes(tmp_path: Path):
    """But for the group that was added by hand."""
    recipe = read_yaml((EXAMPLE / "chord_8gpu.yaml").read_text(encoding="utf-8"))
    assert recipe.pop("parallel") == {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    assert recipe == recipe_of("ms-swift", CHORD, tmp_path).groups()


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_experts_a_step_do_not_depend_on_the_data_parallel_size_here(tmp_path: Path, processes: int):
    """8 accumulated micro-batches of 1 row on each process there: the total is what is written down."""
    recipe = recipe_of("ms-swift", CHORD.replace("NPROC_PER_NODE=8", f"NPROC_PER_NODE={processes}"), tmp_path)
    assert recipe.values["chord.chord_sft_global_batch_size"] == 8 * processes
    assert recipe.values["train.global_batch_size"] == 32 * processes


BASE = "NPROC_PER_NODE=4 swift rlhf --rlhf_type grpo --model m --dataset d.jsonl --tuner_type full "


@pytest.mark.parametrize(
    ("flags", "values"),
    [
        ("", {"optimizer.lr": 1e-5, "grpo.beta": 0.04, "rollout.temperature": 0.9, "train.num_train_epochs": 3.0}),
        ("", {"chord.chord_mu_peak": 0.0, "chord.chord_mu_valley": 0.0, "optimizer.lr_decay_style": "cosine"}),
        ("", {"rollout.max_completion_length": 512, "optimizer.weight_decay": 0.1, "model.recompute": True}),
        # 32 micro-batches a draw, 8 a step: four steps. ms-swift's gspo.sh
        (
            "--steps_per_generation 32 --gradient_accumulation_steps 8 --per_device_train_batch_size 2 "
            "--num_generations 16 --importance_sampling_level sequence --epsilon 3e-4 --epsilon_high 4e-4",
            {
                "grpo.steps_per_generation": 4,
                "train.global_batch_size": 64,
                "grpo.importance_sampling_level": "sequence",
                "grpo.epsilon": 3e-4,
                "grpo.epsilon_high": 4e-4,
                "train.save_steps": 500,
            },
        ),
        ("--generation_batch_size 64 --per_device_train_batch_size 8", {"grpo.steps_per_generation": 2}),
        # 4 completions a step hold no group of 8
        ("--per_device_train_batch_size 1", {"train.global_batch_size": 8, "train.micro_batch_size": 1}),
        ("--max_steps 100 --warmup_steps 10", {"train.train_iters": 100, "optimizer.lr_warmup_iters": 10}),
        ("--warmup_steps 0.1", {"optimizer.lr_warmup_ratio": 0.1}),
        ("--max_length 2000 --truncation_strategy delete", {"data.max_prompt_length": 2000}),
        ("--dataset d.jsonl#1000", {"data.dataset": "d.jsonl#1000"}),
        ("--dataset a.jsonl ms::b.jsonl#10", {"data.dataset": ["a.jsonl", "b.jsonl#10"]}),
        (
            "--per_device_train_batch_size 2 --chord_sft_dataset a.jsonl b.jsonl --chord_mu_peak 0.5 "
            "--chord_mu_valley 0.1 --chord_mu_warmup_steps 0 --chord_mu_decay_steps 4",
            {"chord.chord_sft_dataset": ["a.jsonl", "b.jsonl"], "data.dataset": "d.jsonl"},
        ),
        ("--num_generations_eval 4", {"train.eval_num_generations": None}),
        ("--num_generations_eval 4 --val_dataset v.jsonl", {"train.eval_num_generations": 4}),
        (
            "--swanlab_project p --swanlab_workspace w --swanlab_exp_name e",
            {"tracking.project": "p", "tracking.entity": "w", "tracking.run_name": "e"},
        ),
        ("--dataset a.jsonl hf::org/b#1000", {"data.dataset": ["a.jsonl", "org/b#1000"]}),
        (
            "--dataset a b --interleave_prob 0.2 0.8",
            {"data.dataset": [{"path": "a", "weight": 0.2}, {"path": "b", "weight": 0.8}]},
        ),
        (
            "--chord_sft_dataset c.jsonl d.jsonl --per_device_train_batch_size 8",
            {"chord.chord_sft_dataset": ["c.jsonl", "d.jsonl"]},
        ),
        ('--columns \'{"q": "query", "s": "solution"}\'', {"data.prompt_column": "q", "data.reference_column": "s"}),
        ("--advantage_estimator rloo --beta 0.1", {"grpo.advantage_estimator": "rloo", "grpo.kl_in_reward": True}),
        ("--scale_rewards none", {"grpo.scale_rewards": "none"}),
        ("--top_k -1 --top_p 0.9", {"rollout.top_k": 0, "rollout.top_p": 0.9}),
        (
            "--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs '{\"min_lr\": 1e-7}' --learning_rate 1e-6",
            {"optimizer.lr_decay_style": "cosine", "optimizer.min_lr": 1e-7},
        ),
        (
            "--use_vllm true --vllm_mode server --vllm_server_host 10.0.0.1 --vllm_server_port 8001 "
            "--async_generate true",
            {
                "rollout.vllm_mode": "server",
                "rollout.vllm_servers": ["http://10.0.0.1:8001"],
                "rollout.max_staleness": 1,
                "rollout.vllm_server_timeout": 240.0,
            },
        ),
        (
            "--reward_funcs accuracy mine soft_overlong --reward_weights 1 2 0.5 --soft_cache_length 100",
            {
                "rewards.reward_funcs": ["accuracy", "soft_overlong"],
                "rewards.reward_weights": [1.0, 0.5],
                "rewards.soft_cache_length": 100,
            },
        ),
        (
            "--val_dataset v.jsonl --eval_steps 20",
            {"data.eval_dataset": "v.jsonl", "train.eval_steps": 20, "train.eval_temperature": 0.9},
        ),
        ("--loss_type cispo --epsilon_high 5", {"grpo.loss_type": "cispo", "grpo.epsilon_high": 5.0}),
        (
            "--sequence_parallel_size 2 --per_device_train_batch_size 4",
            {"parallel.context_parallel_size": 2, "train.global_batch_size": 8},
        ),
        ("--system 'a\\nb'", {"data.system_prompt": "a\nb"}),
        ("--use_chat_template false", {"data.prompt_format": "text"}),
        ("--run_name r", {"tracking.run_name": "r"}),
        ("--swanlab_exp_name s", {"tracking.run_name": "s"}),
        ("--ddp_timeout 18000000", {"parallel.distributed_timeout_minutes": 1e5}),
    ],
)
def test_flags_of_ms_swift(flags: str, values: dict, tmp_path: Path):
    recipe = recipe_of("ms-swift", BASE + flags, tmp_path)
    assert {key: recipe.values.get(key) for key in values} == values
    check_plan(recipe)


@pytest.mark.parametrize(
    ("flags", "remark"),
    [
        ("--learning_rat 1", "unknown: --learning_rat 1: no flag of ms-swift that is known here; did you mean"),
        ("--dynamic_sample true", "left out: --dynamic_sample true: groups whose rewards are all alike"),
        ("--reward_funcs cosine", "left out: --reward_funcs: cosine is no reward here"),
        ("--dataset $DATA", "unresolved: --dataset $DATA: the script does not say what $DATA is"),
        ("--val_dataset a b", "left out: --val_dataset a b: only a is read: held-out prompts are of one source"),
        ("--early_stop_interval 3", "left out: --early_stop_interval 3: set train.early_stopping_patience"),
        ("--dataset a b --interleave_prob 0.2 0.8", "approximated: --interleave_prob 0.2 0.8: the share of each"),
        ("--dataset a b --interleave_prob 1", "left out: --interleave_prob 1: must be a share above 0 for each of"),
        ("--dataset a b --interleave_prob 1 0", "left out: --interleave_prob 1 0: must be a share above 0 for each"),
        ("--system nowhere.txt", "unresolved: --system nowhere.txt: there is no such file here"),
        ("--save_strategy epoch", "approximated: --save_strategy epoch: checkpoints are saved every train.save_steps"),
        (
            "--steps_per_generation 4 --per_device_train_batch_size 8 --save_steps 10 --max_steps 7",
            "approximated: --max_steps 7: 8 here, a multiple of the 4 steps of a draw",
        ),
    ],
)
def test_remarks_of_ms_swift(flags: str, remark: str, tmp_path: Path):
    recipe = recipe_of("ms-swift", BASE + flags, tmp_path)
    assert [str(found) for found in recipe.remarks if str(found).startswith(remark)], recipe.remarks


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--tuner_type lora", "--tuner_type lora: adapters are not trained here, all weights are; add `--tuner_type"),
        ("--quant_bits 4", "--quant_bits 4: weights are trained in bfloat16 or float32 here; remove it"),
        ("--rlhf_type dpo", "--rlhf_type dpo: only grpo, with or without CHORD, is trained here"),
        ("--loss_type fipo", "--loss_type fipo: has no counterpart here; of its values there are grpo, bnpo"),
        ("--learning_rate fast", "--learning_rate fast: must be one number"),
        (
            "--max_length $(id)",
            "--max_length $(...): must be one number, and the script does not say which; add --max_length VALUE behind "
            "the script's name",
        ),
        ("--num_generations 2.5", "--num_generations 2.5: must be an integer"),
        ("--epsilon 2", "--epsilon 2: grpo.epsilon=2.0: must be below 1"),
    ],
)
def test_refused_by_ms_swift(flags: str, sentence: str, tmp_path: Path):
    with pytest.raises(UserError) as caught:
        recipe_of("ms-swift", BASE + flags, tmp_path)
    assert str(caught.value).startswith(sentence)


def test_a_script_of_adapters_is_imported_where_one_says_so(tmp_path: Path):
    script = BASE.replace("--tuner_type full", "")
    with pytest.raises(UserError, match="--tuner_type is not given, and ms-swift trains adapters"):
        recipe_of("ms-swift", script, tmp_path)
    assert recipe_of("ms-swift", script, tmp_path, "--tuner_type", "full").values["model.path"] == "m"


def test_variables_of_the_environment_are_expanded_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """But for secrets, which no file is to hold."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("MY_TOKEN", "hf_1234567890")
    monkeypatch.delenv("SCRATCH", raising=False)
    script = f"OUT=$HOME/out\n{BASE} --output_dir $OUT --dataset $SCRATCH/d.jsonl --model $MY_TOKEN"
    recipe = recipe_of("ms-swift", script, tmp_path)
    assert recipe.values["train.output_dir"] == "/home/me/out"
    remarks = [str(remark) for remark in recipe.remarks]
    assert [text for text in remarks if "environment" in text] == [
        "approximated: --output_dir $HOME/out: /home/me/out by the environment of this shell"
    ]
    for flag in ("--dataset $SCRATCH/d.jsonl", "--model $MY_TOKEN"):
        assert [text for text in remarks if text.startswith(f"unresolved: {flag}: the script does not say what")]
    assert "hf_1234567890" not in recipe.to_yaml()


def test_a_password_in_the_environment_is_in_no_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("URL", "https://user:hunter2secret@host/m")
    monkeypatch.setenv("MAX_TOKENS", "4096")
    recipe = recipe_of("ms-swift", BASE + "--model $URL --max_completion_length ${MAX_TOKENS:-1024}", tmp_path)
    assert (recipe.values["model.path"], recipe.values["rollout.max_completion_length"]) == ("$URL", 1024)
    assert "hunter2secret" not in recipe.to_yaml()
    for name in ("$URL", "$MAX_TOKENS"):
        text = f"{name} of this shell is not read: its name or its value speaks of a secret"
        assert [remark.kind for remark in recipe.remarks if remark.text == text] == ["unresolved"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            "--output_dir out $EXTRA_ARGS",
            ["--beta 0.9: by the environment of this shell", "--temperature 0.3: by the environment of this shell"],
        ),
        (
            "--output_dir $OUT_DIR $EXTRA_ARGS",
            [
                "--beta 0.9: by the environment of this shell",
                "--output_dir $OUT_DIR: /out by the environment of this shell",
                "--temperature 0.3: by the environment of this shell",
            ],
        ),
        (
            "--beta 0.1 $EXTRA_ARGS",
            [
                "--beta 0.1: 0.9 by the environment of this shell",
                "--temperature 0.3: by the environment of this shell",
            ],
        ),
        ("$EXTRA_ARGS --beta 0.1", ["--temperature 0.3: by the environment of this shell"]),
        ("--dataset $FILES", ["--dataset $FILES: a.jsonl b.jsonl by the environment of this shell"]),
        ("--async_generate $SWITCH", ["--vllm_enforce_eager: by the environment of this shell"]),
    ],
)
def test_flags_of_the_environment_are_said(
    flags: str, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OUT_DIR", "/out")
    monkeypatch.setenv("EXTRA_ARGS", "--temperature 0.3 --beta 0.9")
    monkeypatch.setenv("FILES", "a.jsonl b.jsonl")
    monkeypatch.setenv("SWITCH", "--vllm_enforce_eager")
    recipe = recipe_of("ms-swift", BASE + flags, tmp_path)
    found = [str(remark) for remark in recipe.remarks if "environment" in remark.text]
    assert sorted(found) == [f"approximated: {text}" for text in said]


def test_a_file_of_flags_is_not_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "grpo.yaml").write_text("model_name_or_path: m\nbeta: 0.2\n", encoding="utf-8")
    monkeypatch.setenv("WHERE", str(tmp_path))
    recipe = recipe_of("trl", "trl grpo --config $WHERE/grpo.yaml", tmp_path)
    assert recipe.values["grpo.beta"] == 0.2
    assert [str(remark) for remark in recipe.remarks if "environment" in remark.text] == [
        f"approximated: --config $WHERE/grpo.yaml: {tmp_path}/grpo.yaml by the environment of this shell"
    ]


def test_a_yaml_file_of_ms_swift(tmp_path: Path):
    path = tmp_path / "args.yaml"
    path.write_text("rlhf_type: grpo\nmodel: m\ndataset: [d.jsonl]\ntuner_type: full\nbeta: 0.1\nENV: {A: b}\n")
    recipe = import_words("ms-swift", [str(path), "--beta", "0.2"], nproc_per_node=2)
    assert (recipe.values["grpo.beta"], recipe.values["train.global_batch_size"]) == (0.2, 8)


GRPO_CONFIG = """
model_name_or_path: m
dataset_name: org/math
learning_rate: 2.0e-6
per_device_train_batch_size: 8
gradient_accumulation_steps: 4
num_generations: 8
max_completion_length: 700
max_prompt_length: 300
num_train_epochs: 2
scale_rewards: false
loss_type: dr_grpo
beta: 0.0
mask_truncated_completions: true
use_vllm: true
vllm_importance_sampling_correction: false
reward_funcs: [accuracy_reward]
report_to: none
bf16: true
output_dir: out
"""


def test_grpo_config_of_trl(tmp_path: Path):
    path = tmp_path / "grpo.yaml"
    path.write_text(GRPO_CONFIG, encoding="utf-8")
    recipe = import_words("trl", [str(path)], nproc_per_node=2)
    assert recipe.groups() == {
        "model": {"path": "m", "recompute": True},
        "data": {"dataset": "org/math", "reference_column": "solution", "max_prompt_length": 300},
        "rewards": {"reward_funcs": ["accuracy"]},
        "rollout": {
            "engine": "vllm",
            "num_generations": 8,
            "max_completion_length": 700,
            "vllm_mode": "colocate",
            "vllm_gpu_memory_utilization": 0.3,
        },
        "grpo": {"loss_type": "dr_grpo", "beta": 0.0, "scale_rewards": "none", "overlong_filter": True},
        "chord": {"chord_mu_peak": 0.0, "chord_mu_valley": 0.0},
        "optimizer": {"lr": 2e-6, "lr_decay_style": "linear", "adam_beta2": 0.999},
        "train": {
            "output_dir": "out",
            "micro_batch_size": 8,
            "global_batch_size": 64,
            "num_train_epochs": 2.0,
            "seed": 42,
            "save_steps": 500,
        },
        "tracking": {"report_to": []},
    }
    assert recipe.remarks == []
    check_plan(recipe)


@pytest.mark.parametrize(
    ("flags", "values"),
    [
        ("--use_vllm", {"grpo.rollout_importance_sampling_mode": "sequence_mask"}),
        ("--use_vllm", {"grpo.rollout_importance_sampling_threshold": 3.0}),
        ("--sapo_temperature_pos 2 --loss_type sapo", {"grpo.tau_pos": 2.0, "grpo.loss_type": "sapo"}),
        ("--multi_objective_aggregation normalize_then_sum", {"grpo.scale_rewards": "gdpo"}),
        ("--steps_per_generation 8", {"grpo.steps_per_generation": 8}),
        ("--dataset_name a --dataset_config main", {"data.dataset": "a:main"}),
        ("--run_name r", {"tracking.run_name": "r"}),
        ("--dataset_name a --num_generations_eval 4", {"train.eval_num_generations": None}),
        (
            "--eval_strategy steps --num_generations_eval 4",
            {"train.eval_num_generations": None, "train.eval_temperature": None},
        ),
        (
            "--dataset_name a --eval_strategy steps --num_generations_eval 4",
            {"train.eval_num_generations": 4, "train.eval_temperature": 1.0},
        ),
        ("--dataset_name a#5 --eval_strategy steps", {"data.eval_dataset": "a#5"}),
    ],
)
def test_arguments_of_trl(flags: str, values: dict):
    recipe = import_words("trl", ["--model_name_or_path", "m", *flags.split()])
    assert {key: recipe.values.get(key) for key in values} == values
    check_plan(recipe)


@pytest.mark.parametrize(
    ("trainer", "flags"),
    [("trl", "--model_name_or_path m --eval_strategy steps"), ("ms-swift", BASE.partition("rlhf ")[2])],
)
def test_answers_to_held_out_prompts_that_are_not_there_are_without_effect(trainer: str, flags: str):
    recipe = import_words(trainer, [*flags.split(), "--num_generations_eval", "4"])
    assert ("--num_generations_eval 4", "there are no held-out prompts") in recipe.without_effect


MIXTURE = """
model_name_or_path: m
datasets:
  - {path: org/a, name: main}
  - {path: b.jsonl, split: train}
  - {path: json, data_files: c.jsonl}
"""


def test_a_mixture_of_trl(tmp_path: Path):
    path = tmp_path / "mixture.yaml"
    path.write_text(MIXTURE, encoding="utf-8")
    recipe = import_words("trl", [str(path)])
    assert recipe.values["data.dataset"] == ["org/a:main", "b.jsonl", "json"]
    assert [remark.text for remark in recipe.remarks if remark.flag == "datasets"] == [
        "of b.jsonl, split is not taken over; data.dataset_split holds for all",
        "of json, data_files is not taken over; name the files in data.dataset",
    ]
    check_plan(recipe)


def test_a_script_from_windows(tmp_path: Path):
    """Notepad's mark in front, and its line ends."""
    path = tmp_path / "old.sh"
    path.write_bytes(b"\xef\xbb\xbf" + BASE.encode() + b"\\\r\n --learning_rate 3e-6\r\n")
    assert import_words("ms-swift", [str(path)]).values["optimizer.lr"] == 3e-6


def test_a_script_that_trains_twice_says_which_call_was_read(tmp_path: Path):
    recipe = recipe_of("ms-swift", f"{BASE}--learning_rate 1e-6\n{BASE}--learning_rate 2e-6\n", tmp_path)
    assert recipe.values["optimizer.lr"] == 1e-6
    assert [remark.text for remark in recipe.remarks if "calls" in remark.text] == [
        "train.sh calls ms-swift 2 times; the first call was read: to read another, give its arguments alone"
    ]


def test_a_script_of_accelerate(tmp_path: Path):
    script = "accelerate launch --num_processes 4 --config_file ds.yaml train.py --model_name_or_path m --beta 0.1"
    recipe = recipe_of("trl", script, tmp_path)
    assert (recipe.nproc_per_node, recipe.values["train.global_batch_size"]) == (4, 32)


def test_python_is_not_run(tmp_path: Path):
    path = tmp_path / "train.py"
    path.write_text("raise SystemExit(3)")
    with pytest.raises(UserError, match="is Python, which is not run"):
        import_words("trl", [str(path)])


# The keys and values of verl's examples/grpo_trainer/run_qwen2-7b.sh (commit b178a3c), in another order.
VERL_SCRIPT = """
set -x
python3 -m verl.trainer.main_ppo algorithm.adv_estimator=grpo algorithm.use_kl_in_reward=False \\
    data.train_files=$HOME/train.parquet data.val_files=$HOME/test.parquet data.train_batch_size=1024 \\
    data.max_prompt_length=512 data.max_response_length=1024 data.filter_overlong_prompts=True \\
    data.truncation='error' \\
    actor_rollout_ref.model.path=Qwen/Qwen2-7B-Instruct actor_rollout_ref.model.use_remove_padding=True \\
    actor_rollout_ref.model.enable_gradient_checkpointing=True actor_rollout_ref.actor.optim.lr=1e-6 \\
    actor_rollout_ref.actor.ppo_mini_batch_size=256 actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=40 \\
    actor_rollout_ref.actor.use_kl_loss=True actor_rollout_ref.actor.kl_loss_coef=0.001 \\
    actor_rollout_ref.actor.kl_loss_type=low_var_kl actor_rollout_ref.actor.entropy_coeff=0 \\
    actor_rollout_ref.actor.fsdp_config.param_offload=False \\
    actor_rollout_ref.actor.fsdp_config.optimizer_offload=False \\
    actor_rollout_ref.rollout.name=vllm actor_rollout_ref.rollout.tensor_model_parallel_size=2 \\
    actor_rollout_ref.rollout.gpu_memory_utilization=0.6 actor_rollout_ref.rollout.n=5 \\
    actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=40 \\
    actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=40 actor_rollout_ref.ref.fsdp_config.param_offload=True \\
    trainer.critic_warmup=0 trainer.logger='["console","tensorboard"]' trainer.project_name='gsm8k' \\
    trainer.experiment_name='a' trainer.n_gpus_per_node=8 trainer.nnodes=1 trainer.save_freq=20 trainer.test_freq=5 \\
    trainer.total_epochs=15 $@
"""


def test_a_script_of_verl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/me")
    recipe = recipe_of("verl", VERL_SCRIPT, tmp_path)
    assert recipe.groups() == {
        "model": {"path": "Qwen/Qwen2-7B-Instruct", "recompute": True},
        "data": {
            "dataset": "/home/me/train.parquet",
            "eval_dataset": "/home/me/test.parquet",
            "reference_column": "reward_model.ground_truth",
            "max_prompt_length": 512,
        },
        "rewards": {"reward_funcs": ["accuracy"]},
        "rollout": {
            "engine": "vllm",
            "num_generations": 5,
            "max_completion_length": 1024,
            "vllm_mode": "colocate",
            "vllm_tensor_parallel_size": 2,
            "vllm_gpu_memory_utilization": 0.6,
            "sleep_level": 1,
        },
        "grpo": {
            "loss_type": "dapo",
            "epsilon": 0.2,
            "delta": 3.0,
            "entropy_coef": 0.0,
            "beta": 0.001,
            "kl_estimator": "k3",
            "advantage_estimator": "grpo",
            "steps_per_generation": 4,
        },
        "chord": {"chord_mu_peak": 0.0, "chord_mu_valley": 0.0},
        "optimizer": {"lr": 1e-6, "weight_decay": 0.01, "adam_beta2": 0.999, "use_distributed_optimizer": True},
        "train": {
            "output_dir": "checkpoints/gsm8k/a",
            "micro_batch_size": 40,
            "global_batch_size": 1280,  # 256 prompts x 5
            "num_train_epochs": 15.0,
            "eval_steps": 20,  # 5 draws of 4 steps
            "save_steps": 80,
        },
        "tracking": {"report_to": ["tensorboard"], "project": "gsm8k", "run_name": "a"},
    }
    assert recipe.nproc_per_node == 8
    check_plan(recipe)


KEYS = ["algorithm.adv_estimator=grpo", "actor_rollout_ref.model.path=m", "actor_rollout_ref.rollout.n=8"]


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        ("actor_rollout_ref.actor.policy_loss.loss_mode=gspo", {"grpo.importance_sampling_level": "sequence"}),
        ("actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean", {"grpo.loss_type": "grpo"}),
        ("actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum-norm", {"grpo.loss_type": "dr_grpo"}),
        ("actor_rollout_ref.actor.clip_ratio_high=0.28", {"grpo.epsilon_high": 0.28, "grpo.epsilon": 0.2}),
        (
            "actor_rollout_ref.actor.policy_loss.loss_mode=cispo actor_rollout_ref.actor.clip_ratio_high=4",
            {"grpo.loss_type": "cispo", "grpo.epsilon_high": 5.0},
        ),
        (
            "algorithm.use_kl_in_reward=True algorithm.kl_ctrl.kl_coef=0.01",
            {"grpo.kl_in_reward": True, "grpo.beta": 0.01},
        ),
        ("algorithm.norm_adv_by_std_in_grpo=False", {"grpo.scale_rewards": "none"}),
        ("trainer.total_training_steps=10 data.train_batch_size=512", {"train.train_iters": 20}),
        (
            "actor_rollout_ref.actor.use_dynamic_bsz=True actor_rollout_ref.actor.ppo_max_token_len_per_gpu=9000",
            {"train.max_tokens_per_micro_batch": 9000, "train.micro_batch_size": None},
        ),
        (
            "actor_rollout_ref.actor.megatron.tensor_model_parallel_size=4",
            {"parallel.tensor_model_parallel_size": 4, "parallel.sequence_parallel": True},
        ),
        ("data.train_files=\"['a.parquet']\" data.train_max_samples=7", {"data.dataset": "a.parquet#7"}),
        ("data.train_files=\"['a.parquet','b.parquet']\"", {"data.dataset": ["a.parquet", "b.parquet"]}),
        (
            "data.train_files=\"['a.parquet','b.parquet']\" data.train_max_samples=7",
            {"data.dataset": ["a.parquet", "b.parquet"], "data.max_rows": None},
        ),
        (
            "data.val_files=v.parquet actor_rollout_ref.rollout.val_kwargs.do_sample=True "
            "actor_rollout_ref.rollout.val_kwargs.temperature=0.6 actor_rollout_ref.rollout.val_kwargs.n=16",
            {"train.eval_num_generations": 16, "train.eval_temperature": 0.6},
        ),
        (
            "data.val_files=v.parquet actor_rollout_ref.rollout.val_kwargs.n=16",
            {"train.eval_num_generations": None, "train.eval_temperature": None},
        ),
        (
            "data.val_files=v.parquet actor_rollout_ref.rollout.val_kwargs.do_sample=True "
            "actor_rollout_ref.rollout.val_kwargs.n=4",
            {"train.eval_num_generations": None, "train.eval_temperature": None},
        ),
        (
            "+reward_model.reward_kwargs.overlong_buffer_cfg.enable=True "
            "+reward_model.reward_kwargs.overlong_buffer_cfg.len=100 "
            "+reward_model.reward_kwargs.overlong_buffer_cfg.penalty_factor=0.5",
            {
                "rewards.reward_funcs": ["accuracy", "soft_overlong"],
                "rewards.reward_weights": [1.0, 0.5],
                "rewards.soft_cache_length": 100,
            },
        ),
    ],
)
def test_keys_of_verl(keys: str, values: dict, tmp_path: Path):
    recipe = recipe_of("verl", "python -m verl.trainer.main_ppo " + " ".join(KEYS) + " " + keys, tmp_path)
    assert {key: recipe.values.get(key) for key in values} == values
    check_plan(recipe)


@pytest.mark.parametrize("sampled", ["", "actor_rollout_ref.rollout.val_kwargs.do_sample=True"])
def test_several_greedy_answers_of_verl_are_one(sampled: str):
    several = "actor_rollout_ref.rollout.val_kwargs.n=4"
    recipe = import_words("verl", [*KEYS, "data.val_files=v.parquet", several, *sampled.split()])
    assert (several, "each answer at temperature 0 is the same") in recipe.without_effect
    check_plan(recipe)


@pytest.mark.parametrize(
    ("table", "names"),
    [
        (ms_swift.TABLE, " ".join([*MS_SWIFT.values(), MS_SWIFT_IN_SCRIPTS])),
        (trl.TABLE, f"{TRL} {TRAINING_ARGUMENTS}"),
        (verl_keys.TABLE, VERL),
    ],
)
def test_every_flag_is_known(table: dict, names: str):
    assert [name for name in names.split() if name not in table] == []


@pytest.mark.parametrize("table", [ms_swift.TABLE, trl.TABLE, verl_keys.TABLE])
def test_every_target_is_a_key(table: dict):
    known = known_keys()
    assert [(name, key) for name, row in table.items() for key in row.targets if key not in known] == []


def run(*words: str):
    return CliRunner().invoke(app, ["import", *words])


def test_the_command(tmp_path: Path):
    path = tmp_path / "chord.sh"
    path.write_text(CHORD, encoding="utf-8")
    done = run("ms-swift", str(path))
    assert done.exit_code == 0
    assert read_yaml(done.stdout)["grpo"] == CHORD_CONFIG["grpo"]
    assert "hardware: --deepspeed zero3: optimizer states are spread over all ranks" in done.stderr
    found = json.loads(run("ms-swift", str(path), "--json").stdout)
    assert found["config"]["train"] == CHORD_CONFIG["train"]
    assert (found["nproc_per_node"], found["remarks"][0]["kind"]) == (8, "hardware")


def test_arguments_as_they_stand():
    done = run("ms-swift", "--tuner_type", "full", "--model", "m", "--dataset", "d.jsonl", "--top_k", "-1")
    assert (done.exit_code, read_yaml(done.stdout)["model"]["path"]) == (0, "m")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["swift"], "error: 'swift' is no trainer that can be imported; there are ms-swift, trl, verl; did you mean"),
        (["verl"], "error: give verl's script or its arguments"),
        (["ms-swift", "nowhere.sh"], "error: cannot read nowhere.sh: No such file or directory"),
    ],
)
def test_refused_by_the_command(words: list[str], sentence: str):
    done = run(*words)
    assert (done.exit_code, done.stdout, done.stderr[: len(sentence)]) == (2, "", sentence)
