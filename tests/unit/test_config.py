"""Configuration: what loads, what is refused, and that the refusal names the key and the remedy."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from chord_megatron.config import Config, known_keys, load_config, to_yaml
from chord_megatron.system.errors import UserError
from chord_megatron.system.yaml_text import write_yaml

MINIMAL = """
model: {path: some/model}
data: {dataset: prompts.jsonl}
train: {output_dir: out, global_batch_size: 16, train_iters: 3}
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load_config(path, list(overrides))
    return str(error.value)


def test_a_minimal_file_gets_the_documented_defaults(minimal: Path):
    config = load_config(minimal)
    assert config.model.path == "some/model" and config.model.dtype == "bfloat16"
    assert config.parallel.tensor_model_parallel_size == config.parallel.expert_model_parallel_size == 1
    assert config.rewards.reward_funcs == ["accuracy"]
    assert (config.rollout.num_generations, config.rollout.temperature, config.rollout.top_p) == (8, 1.0, 1.0)
    assert (config.grpo.epsilon, config.grpo.epsilon_high, config.grpo.beta) == (0.2, None, 0.0)
    assert config.grpo.loss_type == "dapo"
    assert config.grpo.rollout_importance_sampling_mode is None
    assert config.grpo.rollout_importance_sampling_threshold == 2.0
    assert (config.chord.chord_mu_peak, config.chord.chord_mu_valley) == (0.5, 0.05)
    assert config.chord.chord_sft_dataset is None and config.chord.chord_enable_phi_function is False
    assert config.optimizer.lr == 1e-6
    assert (config.train.global_batch_size, config.train.train_iters, config.train.seed) == (16, 3, 0)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.train_itres=5", "unknown configuration key 'train.train_itres'; did you mean 'train.train_iters'?"),
        ("optmizer.lr=1", "unknown configuration key 'optmizer'; did you mean 'optimizer'?"),
        ("train.beta=1", "unknown configuration key 'train.beta'; did you mean 'grpo.beta'?"),
        ("train.lr=1", "unknown configuration key 'train.lr'; did you mean 'optimizer.lr'?"),
        ("grpo.top_p=1", "unknown configuration key 'grpo.top_p'; did you mean 'rollout.top_p'?"),
        ("rollout.seed=1", "unknown configuration key 'rollout.seed'; did you mean 'train.seed'?"),
        ("num_generations=4", "unknown configuration key 'num_generations'; did you mean 'rollout.num_generations'?"),
        ("chord.mu_peak=1", "unknown configuration key 'chord.mu_peak'; did you mean 'chord.chord_mu_peak'?"),
    ],
)
def test_an_unknown_key_names_the_nearest(minimal: Path, override: str, expected: str):
    assert refusal(minimal, override) == expected


def test_an_unknown_key_like_no_other_names_the_groups(minimal: Path):
    message = refusal(minimal, "zzzz=1")
    assert message == f"unknown configuration key 'zzzz'; known groups are {', '.join(Config.model_fields)}"


def test_every_leaf_in_the_wrong_group_is_suggested_in_the_right_one(minimal: Path):
    for key in known_keys():
        group, _, leaf = key.partition(".")
        if leaf:
            wrong = "tracking" if group != "tracking" else "rewards"
            assert refusal(minimal, f"{wrong}.{leaf}=1").endswith(f"did you mean {key!r}?")


def test_overrides_are_yaml_values(minimal: Path):
    config = load_config(
        minimal,
        [
            "optimizer.lr=1e-3",
            "optimizer.min_lr=2.5e-4",
            "rewards.reward_funcs=[accuracy, format]",
            "rewards.reward_weights=[1, 0.5]",
            "rollout.stop_token_ids=[2, 5]",
            "data.num_eval_prompts=null",
            "model.recompute=true",
            "train.seed=7",
            "train.seed=8",
        ],
    )
    assert (config.optimizer.lr, config.optimizer.min_lr) == (1e-3, 2.5e-4)
    assert config.rewards.reward_funcs == ["accuracy", "format"] and config.rewards.reward_weights == [1.0, 0.5]
    assert config.rollout.stop_token_ids == [2, 5]
    assert config.data.num_eval_prompts is None and config.model.recompute is True
    assert config.train.seed == 8  # the last one wins


def test_an_override_fills_a_group_that_the_file_leaves_empty(minimal: Path):
    minimal.write_text(MINIMAL + "grpo:\n", encoding="utf-8")
    assert load_config(minimal, ["grpo.beta=0.04"]).grpo.beta == 0.04


def test_the_value_of_an_override_may_hold_an_equals_sign(minimal: Path):
    config = load_config(minimal, [r"data.reference_pattern=x=(\d+)"])
    assert config.data.reference_pattern == r"x=(\d+)"


@pytest.mark.parametrize(
    "text",
    [
        r"####\s*(.+)",
        r"#(.+)",
        "runs/exp #2",
        "a: b",
        "- a",
        "*(.+)",
        "&(.+)",
        "!(.+)",
        "|(.+)",
        ">(.+)",
        "%(.+)",
        "@(.+)",
        "`(.+)",
        "?(.+)",
        "(.+), (.+)",
        r"\boxed{(.+)}",
        "a\nb",
    ],
)
def test_the_text_of_an_override_is_literal(minimal: Path, text: str):
    """A shell's argument has no comments, and a regular expression may begin with what means something in YAML."""
    config = load_config(minimal, [f"train.output_dir={text}", f"data.system_prompt={text}"])
    assert config.data.system_prompt == config.train.output_dir == text


@pytest.mark.parametrize("value", ["[1, 2] # two", "[1] [2]", "'a' # b", "'a' b", '"a" "b"', "{a: b} c"])
def test_what_follows_the_value_of_an_override_is_not_dropped(minimal: Path, value: str):
    assert refusal(minimal, f"data.reference_pattern={value}") == (
        f"override {f'data.reference_pattern={value}'!r}: the value is not valid YAML; put text in quotes"
    )


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.seed", "override 'train.seed' must look like group.key=value"),
        ("=3", "override '=3' must look like group.key=value"),
        ("model.path.name=3", "override 'model.path.name=3': 'path' is a value, not a group"),
        ("train.seed=[1", "override 'train.seed=[1': the value is not valid YAML; put text in quotes"),
        (
            "train={seed: 1}",
            "override 'train={seed: 1}': 'train' is a group; set one of its keys, as in train.KEY=value",
        ),
        ("train=", "override 'train=': 'train' is a group; set one of its keys, as in train.KEY=value"),
        ("train.seed 3", "override 'train.seed 3' must look like group.key=value"),
        ("train.seed:3", "override 'train.seed:3' must look like group.key=value"),
        ("--optimizer.lr=1", "unknown configuration key '--optimizer'; did you mean 'optimizer'?"),
        ("train..seed=3", "unknown configuration key 'train.'; did you mean 'train'?"),
    ],
)
def test_a_malformed_override_is_explained(minimal: Path, override: str, expected: str):
    assert refusal(minimal, override) == expected


@pytest.mark.parametrize(
    ("override", "start"),
    [
        ("train.global_batch_size=0", "train.global_batch_size=0: "),
        ("chord.chord_mu_peak=1.5", "chord.chord_mu_peak=1.5: "),
        ("rollout.temperature=0", "rollout.temperature=0: "),
        ("grpo.loss_type=ppo", "grpo.loss_type='ppo': "),
        ("grpo.rollout_importance_sampling_mode=token", "grpo.rollout_importance_sampling_mode='token': "),
        ("grpo.rollout_importance_sampling_threshold=1", "grpo.rollout_importance_sampling_threshold=1: "),
        ("optimizer.lr=.nan", "optimizer.lr=nan: "),
        ("train.train_iters=2.5", "train.train_iters=2.5: "),
        ("rewards.reward_funcs=[]", "rewards.reward_funcs=[]: "),
        ("parallel.context_parallel_size=0", "parallel.context_parallel_size=0: "),
        ("parallel.expert_model_parallel_size=0", "parallel.expert_model_parallel_size=0: "),
    ],
)
def test_a_value_out_of_range_names_key_and_value(minimal: Path, override: str, start: str):
    assert refusal(minimal, override).startswith(start)


def test_a_missing_key_is_named(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text("model: {path: m}\ntrain: {output_dir: out}\n", encoding="utf-8")
    message = refusal(path)
    assert message == "configuration key 'train.train_iters' is required"


def test_an_empty_file_asks_for_the_required_groups(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text("", encoding="utf-8")
    assert [part.split("'")[1] for part in refusal(path).split("; ")] == ["model", "train"]


def test_several_mistakes_are_reported_at_once(minimal: Path):
    message = refusal(minimal, "train.beta=1", "train.seed=-1")
    assert "'grpo.beta'" in message and "train.seed=-1" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: [1, 2", "is not valid YAML: while parsing a flow sequence"),
        ("- model\n- data\n", "must hold a mapping of groups (model, data, train, ...), not list"),
        ("only words", "must hold a mapping of groups (model, data, train, ...), not str"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, expected: str):
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    message = refusal(path)
    assert expected in message and str(path) in message and "\n" not in message


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("train: {seed: 1}\n", "line 5: the key 'train' is written twice; keep one of them"),
        ("grpo:\n  beta: 0\n  epsilon: 0.1\n  beta: 1\n", "line 8: the key 'beta' is written twice; keep one of them"),
        ("1: 2\n", "line 5: '1' is no name of a key; put it in quotes"),
        ("grpo: !!python/object/apply:os.getcwd []\n", "the tag '!!python/object/apply:os.getcwd' is not for"),
        ("grpo: " + "[" * 50_000 + "\n", "it is nested too deeply"),
    ],
)
def test_yaml_that_would_be_read_differently_than_meant_is_refused(minimal: Path, text: str, problem: str):
    """PyYAML keeps the last of two groups without a word."""
    minimal.write_text(MINIMAL + text, encoding="utf-8")
    message = refusal(minimal)
    assert message.startswith(f"{minimal} is not valid YAML: ") and problem in message


def test_a_small_number_needs_no_point(minimal: Path):
    """YAML 1.1 reads 1e-6 as text, and text is no number here."""
    minimal.write_text(MINIMAL + "optimizer: {lr: 1e-6, adam_eps: 1E-8}\n", encoding="utf-8")
    config = load_config(minimal, ["optimizer.min_lr=5e-7"])
    assert (config.optimizer.lr, config.optimizer.adam_eps, config.optimizer.min_lr) == (1e-6, 1e-8, 5e-7)


def test_words_are_text_and_only_true_and_false_are_not(minimal: Path):
    config = load_config(minimal, ["data.dataset_split=no", "data.system_prompt=yes", "model.recompute=True"])
    assert (config.data.dataset_split, config.data.system_prompt, config.model.recompute) == ("no", "yes", True)
    assert refusal(minimal, "model.recompute=yes") == (
        "model.recompute='yes': must be true, false, full, or a list of modules such as [core_attn, mlp]"
    )


def test_aliases_of_aliases_do_not_run_away(minimal: Path):
    """Nine to the power of twelve values, of which the sentence shows a few."""
    names = "abcdefghijklm"
    lines = [f"{names[0]}: &{names[0]} [x, x]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in itertools.pairwise(names)]
    minimal.write_text(MINIMAL + "\n".join(lines) + "\ngrpo: {beta: *m}\n", encoding="utf-8")
    assert len(refusal(minimal)) < 1000


def test_many_mistakes_are_counted(minimal: Path):
    message = refusal(minimal, f"rollout.stop_token_ids={[-1] * 1000}")
    assert message.endswith("; and 995 more") and message.count("must be at least 0") == 5


def test_a_path_that_no_file_has_is_a_sentence():
    with pytest.raises(UserError, match="embedded null byte"):
        load_config("a\0b")


def test_a_missing_file_is_a_user_error(tmp_path: Path):
    path = tmp_path / "none.yaml"
    assert refusal(path) == f"cannot read the configuration {path}: No such file or directory"


def test_a_name_that_is_too_long_is_a_user_error(tmp_path: Path):
    path = tmp_path / ("x" * 300)
    assert refusal(path) == f"cannot read the configuration {path}: File name too long"


def test_a_run_directory_names_its_configuration(tmp_path: Path):
    said = f"cannot read the configuration {tmp_path}: Is a directory"
    assert refusal(tmp_path) == said
    (tmp_path / "config.yaml").touch()
    assert refusal(tmp_path) == f"{said}; name {tmp_path}/config.yaml"


def test_the_resolved_configuration_reads_back_equal(minimal: Path, tmp_path: Path):
    config = load_config(
        minimal,
        ["optimizer.lr=3e-7", "grpo.epsilon_high=0.28", "rollout.stop_token_ids=[2]", "data.system_prompt='é: #'"],
    )
    written = tmp_path / "resolved.yaml"
    written.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(written) == config
    assert config.data.system_prompt == "é: #"
    leaves = [f"{group}.{leaf}" for group, values in yaml.safe_load(to_yaml(config)).items() for leaf in values]
    assert leaves == [key for key in known_keys() if "." in key]  # every leaf is written, defaults too


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "data": st.fixed_dictionaries(
                {"dataset": st.text(min_size=1, max_size=60)},
                optional={
                    "system_prompt": st.none() | st.text(),
                    "reference_pattern": st.none() | st.text().map(lambda text: f"({re.escape(text)})"),
                    "prompt_column": st.text(min_size=1),
                },
            ),
            "rollout": st.fixed_dictionaries(
                {},
                optional={
                    "temperature": st.floats(0.01, 100),
                    "top_p": st.floats(0, 1, exclude_min=True),
                    "stop_token_ids": st.none() | st.lists(st.integers(0, 2**31 - 1), min_size=1),
                },
            ),
            "optimizer": st.fixed_dictionaries(
                {}, optional={"lr": st.floats(1e-300, 1e30), "adam_beta1": st.floats(0, 1, exclude_max=True)}
            ),
            "rewards": st.fixed_dictionaries(
                {}, optional={"reward_weights": st.none() | st.lists(st.floats(-1e30, 1e30))}
            ),
        },
    )
)
@settings(derandomize=True, max_examples=200, deadline=None)
def test_what_is_written_reads_back(tmp_path_factory: pytest.TempPathFactory, changes: dict[str, dict[str, object]]):
    """From values, through a file, and as overrides."""
    required = {group: {**values, **changes.get(group, {})} for group, values in yaml.safe_load(MINIMAL).items()}
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    try:
        config = Config.model_validate({**changes, **required})
    except ValidationError as error:
        assert {item["type"] for item in error.errors()} == {"value_error"}, error  # text with NUL
        return
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(path) == config
    path.write_text(MINIMAL, encoding="utf-8")
    overrides = [
        f"{group}.{leaf}={as_override(value)}" for group, values in changes.items() for leaf, value in values.items()
    ]
    assert load_config(path, overrides) == config


def as_override(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(as_override, value))}]"
    if isinstance(value, str):
        return yaml.safe_dump(value, default_style='"')
    return write_yaml(value).removesuffix("...\n")


def test_the_configuration_cannot_be_changed(minimal: Path):
    with pytest.raises(ValueError, match="frozen"):
        load_config(minimal).train.seed = 3
