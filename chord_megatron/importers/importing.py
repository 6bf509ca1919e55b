"""Which trainer, what was given, and the recipe that comes of it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from chord_megatron.importers.flags import Flags, read_arguments, read_file, read_keys, read_mapping
from chord_megatron.importers.ms_swift import from_ms_swift
from chord_megatron.importers.recipe import Recipe
from chord_megatron.importers.shell import Command, read_script
from chord_megatron.importers.trl import from_trl, refuse_python
from chord_megatron.importers.verl import from_verl
from chord_megatron.system.errors import UserError
from chord_megatron.system.secrets import has_password, is_secret
from chord_megatron.system.sentences import did_you_mean, shown

Fill = Callable[[Flags, Recipe], None]
TRAINERS: dict[str, Fill] = {"ms-swift": from_ms_swift, "trl": from_trl, "verl": from_verl}

# The command of a script that trains, in the words before its flags.
_COMMANDS = {
    "ms-swift": re.compile(
        r"(?:^| )(?:swift|[^ ]*swift/cli/main\.py|swift\.cli\.main) rlhf(?: |$)|swift[/.]cli[/.]rlhf"
    ),
    "trl": re.compile(r"(?:^| )trl grpo(?: |$)|trl[/.]scripts[/.]grpo|(?:^| )[^ ]*\.py(?: |$)"),
    "verl": re.compile(r"verl\.trainer\.main_ppo|verl/trainer/main_ppo\.py"),
}
_CALLS = {"ms-swift": "swift rlhf", "trl": "trl grpo, or a script of yours", "verl": "python -m verl.trainer.main_ppo"}


def import_words(
    trainer: str, words: list[str], *, nproc_per_node: int | None = None, nnodes: int | None = None
) -> Recipe:
    """The recipe of what was given: a file, arguments, or a file and arguments that go before its own.

    A script is read and not run. Raises UserError.
    """
    if trainer not in TRAINERS:
        raise UserError(
            f"{shown(trainer)} is no trainer that can be imported; there are {', '.join(TRAINERS)}"
            + did_you_mean(trainer, [*TRAINERS])
        )
    if not words:
        raise UserError(f"give {trainer}'s script or its arguments, as in `chord-megatron import {trainer} train.sh`")
    recipe = Recipe(trainer)
    flags = _given(trainer, words, recipe)
    recipe.nproc_per_node = nproc_per_node or recipe.nproc_per_node
    recipe.nnodes = nnodes or recipe.nnodes
    TRAINERS[trainer](flags, recipe)
    recipe.check()
    return recipe


def _given(trainer: str, words: list[str], recipe: Recipe) -> Flags:
    dash = "" if trainer == "verl" else "--"
    first = words[0]
    if first.startswith("-") or ("=" in first and not Path(first).exists()):
        return Flags(_read(trainer, words, recipe), dash)
    path, rest = Path(first), _read(trainer, words[1:], recipe)
    if path.suffix in (".yaml", ".yml", ".json"):
        if trainer == "verl":
            raise UserError(f"{first}: of verl the script or the key=value arguments are read, not its YAML files")
        return Flags({**_mapping(path), **rest}, dash)
    if path.suffix == ".py":
        refuse_python(first)
    command, as_written, notes = _command_of(trainer, path)
    for note in notes:
        recipe.remark("unresolved", "", note)
    before, after = _parts(trainer, command)
    _processes(before, command.environment, recipe)
    flags = {**_read(trainer, after, recipe), **rest}
    for name in dict.fromkeys(command.unresolved):
        _say_unresolved(name, flags, recipe, dash)
    _say_environment(after, as_written.words, rest, recipe, dash)
    return Flags(flags, dash)


def _read(trainer: str, words: list[str], recipe: Recipe) -> dict[str, list[str]]:
    if trainer == "verl":
        keys, others = read_keys(words)
        others = [word for word in others if not word.startswith(("--config", "-"))]
    else:
        keys, others = read_arguments(words)
        files = [word for word in others if word.endswith((".yaml", ".yml", ".json"))]
        if "config" in keys and trainer == "trl":
            files += keys.pop("config")
        for file in files:
            keys = {**_mapping(Path(file)), **keys}
        others = [word for word in others if word not in files]
    for word in others:
        recipe.remark("unknown", word[:60], "no flag; it was not read")
    return keys


def _mapping(path: Path) -> dict[str, list[str]]:
    """Flags of a file; ms-swift's may hold variables of the environment beside them."""
    return {key: words for key, words in read_mapping(path).items() if key not in ("ENV", "env")}


def _command_of(trainer: str, path: Path) -> tuple[Command, Command, list[str]]:
    """The command, the same without what the environment says, and what to say of the script."""
    content = read_file(path)
    script = read_script(content, path.name, _environment())
    if calls := [place for place, command in enumerate(script.commands) if _COMMANDS[trainer].search(_front(command))]:
        if len(calls) > 1:
            text = f"{path.name} calls {trainer} {len(calls)} times; the first call was read: to read another, give its"
            script.notes.append(f"{text} arguments alone")
        return script.commands[calls[0]], read_script(content, path.name).commands[calls[0]], script.notes
    if any(re.search(r"(^| )megatron rlhf", _front(command)) for command in script.commands):
        raise UserError(f"{path} calls `megatron rlhf`, whose flags count otherwise; only `swift rlhf` is read")
    raise UserError(f"{path} has no command of {trainer} ({_CALLS[trainer]}); name the script that trains")


def _environment() -> dict[str, str | None]:
    """Without the values of secrets: a configuration is to hold none."""
    return {key: None if is_secret(key) or has_password(value) else value for key, value in os.environ.items()}


def _front(command: Command) -> str:
    return " ".join(command.words[:40])


def _parts(trainer: str, command: Command) -> tuple[list[str], list[str]]:
    """The words up to the call, and its arguments."""
    for end in range(1, len(command.words) + 1):
        if _COMMANDS[trainer].search(" ".join(command.words[:end])):
            return command.words[:end], command.words[end:]
    raise AssertionError("the command was found by this pattern")


def _processes(before: list[str], environment: dict[str, str], recipe: Recipe) -> None:
    """Processes of torchrun, accelerate or ms-swift's own start; where nothing is said, of the visible devices."""
    flags, _ = read_arguments(before)
    count = {name: _count(flags.get(name, [])) for name in ("nproc_per_node", "nnodes", "num_processes")}
    nnodes = count["nnodes"] or _count([environment.get("NNODES", "")]) or _count(flags.get("num_machines", [])) or 1
    recipe.nnodes = nnodes
    per_node = count["nproc_per_node"] or _count([environment.get("NPROC_PER_NODE", "")])
    if per_node is None and count["num_processes"]:
        per_node = max(1, count["num_processes"] // nnodes)
    recipe.nproc_per_node = per_node
    if per_node is None and (devices := environment.get("CUDA_VISIBLE_DEVICES")):
        text = f"{len(devices.split(','))} devices are visible, but nothing says how many processes there are"
        recipe.remark("unresolved", "CUDA_VISIBLE_DEVICES", text)


def _count(words: list[str]) -> int | None:
    return int(words[0]) if words and re.fullmatch("[1-9][0-9]{0,4}", words[0]) else None


def _say_unresolved(name: str, flags: dict[str, list[str]], recipe: Recipe, dash: str) -> None:
    text = f"the script does not say what {name} is; replace it in the configuration"
    for flag, words in flags.items():
        if any(name in word for word in words):
            recipe.remark("unresolved", f"{dash}{flag} {' '.join(words)[:60]}", text)


def _say_environment(
    after: list[str], as_written: list[str], rest: Mapping[str, list[str]], recipe: Recipe, dash: str
) -> None:
    """Which flags are not as the script has them. rest: what goes before them."""
    read = read_arguments if dash else read_keys
    flags, written = Flags(read(after)[0], dash), read(as_written)[0]
    for name in [name for name in flags if name not in rest]:
        if name not in written:  # of a variable that holds whole flags
            recipe.remark("approximated", flags.said(name), "by the environment of this shell")
            continue
        words = written[name][: len(flags[name])]  # such a variable stands behind the words of the flag before it
        if words != flags[name]:
            text = f"{' '.join(flags[name])} by the environment of this shell"
            recipe.remark("approximated", Flags({name: words}, dash).said(name), text)
