"""The rooms of the package: what each may import, how long functions and files are, that each file says what it is."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "chord_megatron"
FILES = sorted(PACKAGE.rglob("*.py"))

# Room -> the others that it may import, each of which is above it here: no arrow runs up.
MAY_IMPORT = {
    "system": "",
    "types": "system",
    "algorithm": "types system",
    "ops": "types system",
    "weights": "system",
    "config_types": "system",
    "config_names": "",
    "config": "config_names config_types algorithm system",
    "batching": "algorithm types system",
    "data": "config config_types types system",
    "rewards": "types system",
    "importers": "config algorithm system",
    "planning": "config config_types algorithm weights types system",
    "inspection": "planning rewards data config config_types weights types system",
    "tracking": "algorithm types system",
    "checkpoints": "weights system",
    "backend": "checkpoints planning batching config config_types ops weights types system",
    "rollout/updates": "weights system",
    "rollout/serving": "rollout/updates rollout weights system",
    "rollout/servers": "rollout/updates rollout types system",
    "rollout": "rollout/updates rollout/servers backend config ops weights types system",
    "doctor": "checkpoints planning tracking data config weights system",
    "training": "rollout backend checkpoints tracking planning rewards data batching config config_types weights "
    "algorithm types system",
    "evaluation": "training rollout backend tracking planning rewards data config weights types system",
    "train": "training system",
    "cli": "importers train evaluation training inspection doctor rollout rollout/serving backend checkpoints tracking "
    "planning rewards data config weights system",
}
# Tensors, numbers and explicit groups in, tensors out.
PURE = ("algorithm", "batching", "ops", "weights")
# A collective of torch.distributed without a group is one of the default group.
COLLECTIVES = (
    "all_",
    "barrier",
    "broadcast",
    "gather",
    "get_rank",
    "get_world_size",
    "recv",
    "reduce",
    "scatter",
    "send",
)

LONGEST_FILE, LONGEST_FUNCTION, MOST_POSITIONAL = 400, 80, 9
P90_OF_FUNCTIONS = 25


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def room_of(parts: tuple[str, ...]) -> str:
    """Of a module's path below the package."""
    nested = "/".join(parts[:2])
    return nested if nested in MAY_IMPORT else parts[0]


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE.parent))


def imports(path: Path) -> Iterator[str]:
    """The rooms that a file imports from, also within functions."""
    for node in ast.walk(parsed(path)):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{name_of(path)} has a relative import"
            is_package = (PACKAGE.parent / node.module.replace(".", "/")).is_dir()
            modules = [f"{node.module}.{alias.name}" for alias in node.names] if is_package else [node.module]
        for module in modules:
            package, *parts = module.split(".")
            if package == PACKAGE.name and parts and parts != ["__version__"]:
                yield room_of(tuple(parts))


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path in FILES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{name_of(path)}:{node.lineno} {node.name}", node


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def test_no_arrow_runs_up():
    below: set[str] = {"rollout"}  # its rooms serve it, and use the protocol and vllm_adapter.py that lie in it
    for room, others in MAY_IMPORT.items():
        assert set(others.split()) <= below, room
        below.add(room)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_what_it_may(room: str):
    allowed = {room, *MAY_IMPORT[room].split()}
    own = [path for path in FILES if room_of(path.relative_to(PACKAGE).with_suffix("").parts) == room]
    assert own, "the room is gone; remove it here"
    wrong = [(name_of(path), other) for path in own for other in imports(path) if other not in allowed]
    assert wrong == []


@pytest.mark.parametrize(
    ("package", "allowed"),
    [("megatron", "chord_megatron/backend/**/*.py"), ("vllm", "chord_megatron/rollout/**/vllm_*.py")],
)
def test_only_its_own_files_import_a_package(package: str, allowed: str):
    """Ruff refuses it, too, but for files that may import the other one."""
    own = set(PACKAGE.parent.glob(allowed))
    importers = {
        path
        for path in FILES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for module in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
        if module.split(".")[0] == package
    }
    assert importers and importers <= own, [name_of(path) for path in importers - own]


def test_every_file_is_in_a_room():
    rooms = {room_of(path.relative_to(PACKAGE).with_suffix("").parts) for path in FILES}
    assert rooms - {"__init__"} == set(MAY_IMPORT)


@pytest.mark.parametrize("room", PURE)
def test_pure_rooms_know_no_default_group(room: str):
    found = [
        f"{name_of(path)}:{node.lineno}"
        for path in FILES
        if path.is_relative_to(PACKAGE / room)
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Call) and _is_collective_of_default_group(node)
    ]
    assert found == []


def _is_collective_of_default_group(call: ast.Call) -> bool:
    function = ast.unparse(call.func)
    is_collective = function.startswith(("dist.", "torch.distributed.")) and function.split(".")[-1].startswith(
        COLLECTIVES
    )
    return is_collective and not any(keyword.arg == "group" for keyword in call.keywords)


def test_every_file_says_what_lives_there():
    assert [name_of(path) for path in FILES if not path.read_text(encoding="utf-8").startswith(('"""', 'r"""'))] == []


def test_files_are_short():
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_FILE} == {}


def test_functions_are_short():
    lengths = {name: length(node) for name, node in functions()}
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_FUNCTION} == {}
    lines = sorted(length(node) for _, node in functions())
    assert lines[int(0.9 * len(lines))] <= P90_OF_FUNCTIONS


def test_functions_have_few_positional_parameters():
    counts = {}
    for name, node in functions():
        names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
        is_kernel = any(ast.unparse(decorator) == "triton.jit" for decorator in node.decorator_list)
        counts[name] = 0 if is_kernel else len(names) - (names[:1] in (["self"], ["cls"]))
    assert {name: count for name, count in counts.items() if count > MOST_POSITIONAL} == {}


def test_the_command_line_imports_nothing_before_a_command_runs():
    heavy = ("torch", "numpy", "pydantic", "transformers", "rich", "yaml")
    code = f"import sys, chord_megatron.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")
