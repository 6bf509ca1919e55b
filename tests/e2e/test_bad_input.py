"""Bad input gets exit code 2, one clear sentence, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from harness import Outcome, read_metrics, train_here, train_on_forks, train_on_two, write_rows

pytestmark = pytest.mark.e2e


def the_error(outcome: Outcome) -> str:
    """The one sentence of a run that was refused."""
    assert outcome.code == 2, outcome.stderr[-2000:]
    assert "Traceback" not in outcome.stderr and "Traceback" not in outcome.stdout
    (error,) = outcome.errors
    assert outcome.stderr.endswith(f"{error}\n"), "the sentence goes on after its first line"
    return error.removeprefix("error: ")


@pytest.fixture
def folder(tmp_path: Path, assets: Path) -> Path:
    """Damaged copies of the assets: data files and model folders, each with one fault."""
    folder = tmp_path / "bad"
    folder.mkdir()
    good = (assets / "prompts.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "torn.jsonl").write_text(good[0] + good[1][:10] + "\n" + good[2], encoding="utf-8")
    (folder / "list.jsonl").write_text(good[0] + "[1, 2]\n", encoding="utf-8")
    (folder / "empty.jsonl").write_text("\n", encoding="utf-8")
    write_rows(folder / "no_answer.jsonl", [{"prompt": "1 + 1 =", "answer": "2"}, {"prompt": "2 + 2 =", "answer": " "}])
    for name in ("no_tokenizer", "torn_tokenizer", "no_end_token", "no_weights", "torn_weights", "gpt2", "no_layer"):
        shutil.copytree(assets / "model", folder / name)
    for path in (folder / "no_tokenizer").glob("tokenizer*"):
        path.unlink()
    (folder / "torn_tokenizer" / "tokenizer.json").write_text('{"version": "1.0", "model"', encoding="utf-8")
    (folder / "loss.py").write_text(
        "from chord_megatron.algorithm.policy_losses import TokenLoss\n"
        "def wrong(tokens): return TokenLoss(tokens.log_probs.log())\n",
        encoding="utf-8",
    )
    edit_json(folder / "no_end_token" / "tokenizer_config.json", eos_token=None)
    (folder / "no_weights" / "model.safetensors").unlink()
    weights = folder / "torn_weights" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    edit_json(folder / "gpt2" / "config.json", architectures=["GPT2LMHeadModel"])
    edit_json(folder / "no_layer" / "config.json", num_hidden_layers=3, layer_types=["full_attention"] * 3)
    return folder


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


# Overrides ({bad}: the folder above, {assets}: the good one) and what the sentence holds.
BEFORE_THE_FIRST_STEP = {
    "unknown key": (
        ("train.train_itres=5",),
        ("unknown configuration key 'train.train_itres'; did you mean 'train.train_iters'?",),
    ),
    "override without a value": (("train.train_iters",), ("'train.train_iters' must look like group.key=value",)),
    "wrong type": (("train.train_iters=many",), ("train.train_iters='many': must be an integer, without quotes",)),
    "TP and heads": (
        ("parallel.tensor_model_parallel_size=3",),
        ("parallel.tensor_model_parallel_size=3 does not divide the model's 4 attention heads", "divisor of 4"),
    ),
    "PP and layers": (
        ("parallel.pipeline_model_parallel_size=5",),
        ("=5 stages are more than the model's 2 layers fill; choose at most 4",),
    ),
    "a part that the model lacks": (
        ("model.recompute=[core_attn, moe]",),
        ("model.recompute names moe, but the model has no experts",),
    ),
    "no field of Megatron-Core": (
        ("model.transformer_config.tp_comm_overlop=true",),
        ("model.transformer_config.tp_comm_overlop is no field of", "did you mean 'tp_comm_overlap'?"),
    ),
    "not the user's": (
        ("model.transformer_config.hidden_dropout=0.1",),
        ("model.transformer_config.hidden_dropout would train on other log-probs",),
    ),
    "needs TransformerEngine": (
        ("model.transformer_config.tp_comm_overlap=true",),
        ("model.transformer_config.tp_comm_overlap=True needs TransformerEngine on a GPU",),
    ),
    "offload without a GPU": (
        (
            "optimizer.optimizer_cpu_offload=true",
            "optimizer.use_distributed_optimizer=true",
            "model.dtype=bfloat16",
        ),
        ("optimizer.optimizer_cpu_offload needs a GPU to offload from, which this machine lacks; set it to false",),
    ),
    "precision without TransformerEngine": (
        (
            "optimizer.use_precision_aware_optimizer=true",
            "optimizer.use_distributed_optimizer=true",
            "model.dtype=bfloat16",
        ),
        ("optimizer.use_precision_aware_optimizer needs TransformerEngine's Adam on a GPU",),
    ),
    "FP8 token by token": (
        ("model.transformer_config.fp8=hybrid",),
        ("model.transformer_config.fp8 multiplies blocks of tokens", "rollout.engine=vllm"),
    ),
    "too few processes": (
        ("parallel.tensor_model_parallel_size=2",),
        ("1 process cannot hold a model on tensor x pipeline = 2 x 1", "--nproc-per-node"),
    ),
    "too few processes for CP": (
        ("parallel.context_parallel_size=2",),
        ("1 process cannot hold a model on tensor x pipeline x context = 1 x 1 x 2 = 2 ranks", "--nproc-per-node"),
    ),
    "groups": (
        ("train.global_batch_size=10",),
        ("train.global_batch_size=10 completions is not a multiple of rollout.num_generations=4",),
    ),
    "micro-batches": (
        ("train.micro_batch_size=3",),
        ("train.global_batch_size=8 is not a multiple of train.micro_batch_size x data-parallel size = 3 x 1 = 3",),
    ),
    "no experts": (("chord.chord_sft_dataset=null",), ("chord.chord_sft_dataset is required while mu > 0",)),
    "torn line": (("data.dataset={bad}/torn.jsonl",), ("{bad}/torn.jsonl:2: not valid JSON: ",)),
    "torn expert line": (
        ("chord.chord_sft_dataset={bad}/torn.jsonl",),
        ("{bad}/torn.jsonl:2: not valid JSON: ",),
    ),
    "not an object": (("data.dataset={bad}/list.jsonl",), ("{bad}/list.jsonl:2: no JSON object but a JSON list",)),
    "no rows": (("data.dataset={bad}/empty.jsonl",), ("{bad}/empty.jsonl has no rows",)),
    "no such file": (("data.dataset={bad}/none.jsonl",), ("cannot read {bad}/none.jsonl: No such file or directory",)),
    "missing column": (
        ("data.prompt_column=question",),
        ("{assets}/prompts.jsonl:1: no column 'question'; it has 'prompt', 'answer', of which data.prompt_column may",),
    ),
    "missing expert column": (
        ("chord.chord_sft_answer_column=solution",),
        ("{assets}/experts.jsonl:1: no column 'solution'; it has 'prompt', 'answer', of which chord.",),
    ),
    "empty reference": (
        ("data.dataset={bad}/no_answer.jsonl",),
        ("{bad}/no_answer.jsonl:2: column 'answer' is empty",),
    ),
    "empty expert answer": (
        ("chord.chord_sft_dataset={bad}/no_answer.jsonl",),
        ("{bad}/no_answer.jsonl:2: column 'answer' is empty",),
    ),
    "all prompts too long": (
        ("data.max_prompt_length=3",),
        ("all 24 usable rows of {assets}/prompts.jsonl are longer than data.max_prompt_length=3",),
    ),
    "all experts too long": (
        ("chord.chord_sft_max_length=3",),
        ("all 16 usable rows of {assets}/experts.jsonl are longer than chord.chord_sft_max_length=3",),
    ),
    "no model folder": (("model.path={bad}/none",), ("{bad}/none is not a directory",)),
    "no tokenizer": (
        ("model.path={bad}/no_tokenizer",),
        ("{bad}/no_tokenizer has no tokenizer (none of tokenizer.json, ", "; copy tokenizer.json"),
    ),
    "torn tokenizer": (
        ("model.path={bad}/torn_tokenizer",),
        ("{bad}/torn_tokenizer has no tokenizer that transformers can load", "; copy tokenizer.json"),
    ),
    "no end token": (
        ("model.path={bad}/no_end_token",),
        ("the tokenizer in {bad}/no_end_token has no eos_token; set one in tokenizer_config.json",),
    ),
    "unsupported architecture": (
        ("model.path={bad}/gpt2",),
        ("GPT2LMHeadModel is not supported; use one of LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM",),
    ),
    "no weights": (
        ("model.path={bad}/no_weights",),
        ("{bad}/no_weights has neither model.safetensors nor model.safetensors.index.json",),
    ),
    "torn weights": (
        ("model.path={bad}/torn_weights",),
        ("{bad}/torn_weights/model.safetensors is not a complete safetensors file", "download it again"),
    ),
    "a layer too few": (
        ("model.path={bad}/no_layer",),
        ("lacks tensors of a qwen3 model: model.layers.2.", "self_attn.v_proj.weight (11); download it again"),
    ),
    "unknown reward": (("rewards.reward_funcs=[acuracy]",), ("unknown reward function 'acuracy'", "'accuracy'?")),
    "no reward function": (
        ("rewards.reward_funcs=[{assets}/rewards.py:leters]",),
        ("{assets}/rewards.py:leters: AttributeError: no function 'leters'; the file has letters, raises, nan",),
    ),
    "a reward function that needs another column": (
        ("rewards.reward_funcs=[{assets}/rewards.py:graded]",),
        (
            "reward function {assets}/rewards.py:graded needs 'difficulty', which is not offered; "
            "offered are prompts, completions, references, completion_ids, the columns answer, and the reference as ",
        ),
    ),
    "a key that the loss does not read": (
        ("grpo.loss_type=sapo", "grpo.delta=3.0"),
        ("grpo.delta=3.0 is not read by grpo.loss_type=sapo; remove it",),
    ),
    "a policy loss that is no number": (
        ("grpo.policy_loss={bad}/loss.py:wrong",),
        ("grpo.policy_loss={bad}/loss.py:wrong has a NaN or infinite loss or gradient on a few tokens, ",),
    ),
    "no recording": (
        ("rollout.engine=replay", "rollout.replay_from={bad}/none.jsonl"),
        ("rollout.replay_from: {bad}/none.jsonl does not exist; record one with rollout.record_to",),
    ),
}


@pytest.mark.parametrize("case", BEFORE_THE_FIRST_STEP)
def test_it_is_refused_before_the_first_step(case: str, config: Path, assets: Path, folder: Path, tmp_path: Path):
    overrides, pieces = BEFORE_THE_FIRST_STEP[case]
    error = the_error(train_here(config, *(override.format(bad=folder, assets=assets) for override in overrides)))
    for piece in pieces:
        assert piece.format(bad=folder, assets=assets) in error
    assert not (tmp_path / "run").exists()


REWARD_FAILURES = {
    "raises": "RuntimeError: no verdict on two lines ({assets}/rewards.py:",
    "nan": "returned nan, not a finite number, at index 0",
}


@pytest.mark.parametrize("name", REWARD_FAILURES)
def test_a_failing_reward_function_stops_the_first_step(name: str, config: Path, assets: Path, tmp_path: Path):
    error = the_error(train_here(config, f"rewards.reward_funcs=[{assets}/rewards.py:{name}]"))
    assert error.startswith(f"reward function {assets}/rewards.py:{name}")
    assert REWARD_FAILURES[name].format(assets=assets) in error
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.stat().st_size) == ["config.yaml"]
    # And the mended configuration starts in the same folder.
    assert train_here(config, "train.train_iters=1").code == 0
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [0]


def test_some_prompts_too_long_are_counted(config: Path, assets: Path, tmp_path: Path):
    prompts = tmp_path / "prompts.jsonl"
    long = {"prompt": "9" * 100, "answer": "9"}
    good = [json.loads(line) for line in (assets / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    write_rows(prompts, [long, *good, long])
    outcome = train_here(config, f"data.dataset={prompts}", "train.train_iters=1")
    assert outcome.code == 0
    assert f"{prompts}: dropped 2 rows above data.max_prompt_length=48\n" in outcome.stdout


def test_the_metrics_of_another_run_are_kept(config: Path, tmp_path: Path):
    (tmp_path / "run").mkdir()
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text('{"step": 0, "loss": 1.0}\n', encoding="utf-8")
    assert "holds the metrics of another run" in the_error(train_here(config))
    assert metrics.read_text(encoding="utf-8") == '{"step": 0, "loss": 1.0}\n'


@pytest.mark.distributed
def test_two_processes_say_it_once(config: Path, folder: Path, tmp_path: Path):
    error = the_error(train_on_two(config, f"data.dataset={folder / 'torn.jsonl'}"))
    assert error.startswith(f"{folder / 'torn.jsonl'}:2: not valid JSON")
    assert not (tmp_path / "run").exists()


@pytest.mark.distributed
def test_two_processes_stop_at_a_failing_reward_function(config: Path, assets: Path, tmp_path: Path):
    outcome = train_on_forks(
        config, f"rewards.reward_funcs=[{assets}/rewards.py:raises]", "parallel.tensor_model_parallel_size=2"
    )
    assert "RuntimeError: no verdict on two lines" in the_error(outcome)
    assert not (tmp_path / "run" / "checkpoints").exists() and not (tmp_path / "run" / "hf").exists()


def test_a_node_that_is_not_one_of_them_is_refused(config: Path):
    """It would wait for a place that nobody has."""
    outcome = train_here(config, "--nnodes", "2", "--node-rank", "2")
    assert outcome.code == 2
    assert outcome.errors == ["error: --node-rank 2 is not one of 2 nodes; they count from 0 to 1"]
