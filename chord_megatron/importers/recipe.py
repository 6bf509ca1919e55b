"""The configuration that comes out, with a word on where each key is from, and remarks on what has no counterpart."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from pydantic import ValidationError

from chord_megatron.algorithm.policy_losses import LOSS_TYPES, parameters_of
from chord_megatron.config import Config, GRPOConfig, TrackingConfig, explain_mistakes
from chord_megatron.system.errors import UserError
from chord_megatron.system.yaml_text import write_yaml_line

# hardware: how a step is computed, not what it computes. approximated: another number, near. left out: nothing here
# does it. unresolved: the script does not say the value.
Kind = Literal["hardware", "approximated", "left out", "unknown", "unresolved"]


@dataclass(frozen=True)
class Remark:
    """Something that the user should know of one flag."""

    kind: Kind
    flag: str  # as it was given; "" of something that was not given
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.flag}: {self.text}" if self.flag else f"{self.kind}: {self.text}"


@dataclass
class Recipe:
    """A configuration in the making."""

    trainer: str
    values: dict[str, Any] = field(default_factory=dict)  # dotted key -> value
    origins: dict[str, str] = field(default_factory=dict)  # dotted key -> where it is from
    remarks: list[Remark] = field(default_factory=list)
    without_effect: list[tuple[str, str]] = field(default_factory=list)  # flag as it was given, why
    nproc_per_node: int | None = None  # None: it was not said
    nnodes: int = 1

    def set(self, key: str, value: Any, origin: str) -> None:
        """A key's value, and the flags that it is from."""
        self.values[key], self.origins[key] = value, origin

    def set_default(self, key: str, value: Any, origin: str) -> None:
        """What the other trainer does where nothing is said; not written down where it is the same here."""
        if key not in self.values and default_of(key) != value:
            self.set(key, value, origin)

    def set_held_out(self, names: list[str], origin: str) -> None:
        """data.eval_dataset, of which there is one."""
        self.set("data.eval_dataset", names[0], origin)
        if len(names) > 1:
            text = f"only {names[0]} is read: held-out prompts are of one source; join the files"
            self.remark("left out", origin, text)

    def remark(self, kind: Kind, flag: str, text: str) -> None:
        """Say something of a flag, once."""
        remark = Remark(kind, flag, text)
        self.remarks += [remark] * (remark not in self.remarks)

    def leave_open(self, key: str, placeholder: str, flag: str, what: str) -> None:
        """A key that has to be set, and that nothing says."""
        self.set(key, placeholder, "not said")
        self.remark("unresolved", flag, f"not given; set {key} to {what}")

    @property
    def world_size(self) -> int:
        """Processes, one where it was not said."""
        return (self.nproc_per_node or 1) * self.nnodes

    def groups(self) -> dict[str, dict[str, Any]]:
        """The configuration as a mapping of groups, in their order."""
        groups: dict[str, dict[str, Any]] = {}
        for group, group_field in Config.model_fields.items():
            leaves: Any = group_field.annotation
            keys = {leaf: self.values.get(f"{group}.{leaf}", _MISSING) for leaf in leaves.model_fields}
            if found := {leaf: value for leaf, value in keys.items() if value is not _MISSING}:
                groups[group] = found
        return groups

    def check(self) -> None:
        """Raise UserError where a value is none that its key may have: the flag said something impossible."""
        try:
            Config.model_validate(self.groups())
        except ValidationError as error:
            from_flags = {self.origins.get(".".join(map(str, item["loc"][:2])), "") for item in error.errors()}
            flags = ", ".join(sorted(filter(None, from_flags)))
            raise UserError(f"{flags or self.trainer}: {explain_mistakes(error)}") from None

    def to_yaml(self) -> str:
        """The configuration with a comment on each key, and the remarks as comments."""
        return "\n".join([*self._head(), *self._body(), *self._tail()]) + "\n"

    def _head(self) -> list[str]:
        start = "chord-megatron train THIS_FILE.yaml"
        start += f" --nproc-per-node {self.nproc_per_node}" if self.nproc_per_node else ""
        start += f" --nnodes {self.nnodes}" if self.nnodes > 1 else ""
        return [f"# From {self.trainer}, by chord-megatron import. Start it with", f"#   {start}"]

    def _body(self) -> list[str]:
        lines: list[str] = []
        for group, leaves in self.groups().items():
            lines += ["", f"{group}:"]
            for leaf, value in leaves.items():
                origin = _comment(self.origins[f"{group}.{leaf}"])
                lines.append(f"  {leaf}: {write_yaml_line(value)}{f'  # {origin}' if origin else ''}")
        return lines

    def _tail(self) -> list[str]:
        by_kind: dict[str, list[str]] = defaultdict(list)
        for remark in self.remarks:
            by_kind[remark.kind].append(f"{remark.flag}: {remark.text}" if remark.flag else remark.text)
        titles = {
            "approximated": "Near, but not the same",
            "left out": "Without a counterpart",
            "unknown": "Not known to the importer",
            "unresolved": "Not said by the script",
            "hardware": "Of the hardware",
        }
        parts = [(title, by_kind[kind]) for kind, title in titles.items()]
        parts.append(("Without effect here", [f"{flag}: {why}" for flag, why in self.without_effect]))
        return [
            line
            for title, lines in parts
            if lines
            for line in ("", f"# {title}", *(f"#   {_comment(text)}" for text in lines))
        ]


_MISSING = object()


def _comment(text: str) -> str:
    """Text of others on one line of a comment."""
    return "".join(character if character.isprintable() else " " for character in " ".join(text.split()))


def one_or_all(names: list[str]) -> str | list[str]:
    """A data set, or several of which each row comes as often as any other."""
    return names[0] if len(names) == 1 else names


def default_of(key: str) -> Any:
    """A key's default here; a required key has none."""
    group, _, leaf = key.partition(".")
    leaves: Any = Config.model_fields[group].annotation
    return leaves.model_fields[leaf].default


def known_trackers() -> tuple[str, ...]:
    """What tracking.report_to may name."""
    (item,) = get_args(TrackingConfig.model_fields["report_to"].annotation)
    return get_args(item)


def drop_unread(recipe: Recipe) -> None:
    """Take out the keys of `grpo` that the loss, or what is switched off, does not read: they are refused here."""
    loss = recipe.values.get("grpo.loss_type", GRPOConfig().loss_type)
    read = parameters_of(LOSS_TYPES[loss].surrogate)
    readers = dict.fromkeys((f"grpo.{key}" for row in LOSS_TYPES.values() for key in parameters_of(row.surrogate)), "")
    unread = {key: f"the loss {loss} does not read it" for key in readers if key.removeprefix("grpo.") not in read}
    if not recipe.values.get("grpo.rollout_importance_sampling_mode"):
        unread["grpo.rollout_importance_sampling_threshold"] = "nothing weighs the samples"
    if not recipe.values.get("grpo.beta") or recipe.values.get("grpo.kl_in_reward"):
        unread["grpo.kl_estimator"] = "the loss has no KL penalty"
    if not recipe.values.get("grpo.beta"):
        unread["grpo.kl_in_reward"] = "there is no KL penalty"
    if "soft_overlong" not in recipe.values.get("rewards.reward_funcs", []):
        unread |= dict.fromkeys(["rewards.soft_max_length", "rewards.soft_cache_length"], "no reward reads it")
    for key, why in unread.items():
        if key in recipe.values and recipe.values[key] != default_of(key):
            recipe.without_effect.append((recipe.origins[key], why))
        recipe.values.pop(key, None)
