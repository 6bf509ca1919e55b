"""Checks a release of megatron-core against what chord_megatron/backend uses of it, without importing either.

    python tools/check_megatron_core.py            # the installed release
    python tools/check_megatron_core.py DIRECTORY  # an unpacked wheel, which holds megatron/core

Looks for every name that the backend imports, what it passes to such a name and what that needs, every method that it
overrides or replaces, and what backend/cpu.py rewrites. Exit code 1 where something is missing. What happens inside
these functions it cannot see: only the tests can.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

BACKEND = Path(__file__).parents[1] / "chord_megatron" / "backend"
# There in some releases only (chord_megatron/backend/releases.py).
OPTIONAL = {
    "megatron.core.tensor_parallel.random._get_share_storage",
    "megatron.core.inference.utils.InferenceMode",
    "megatron.core.transformer.multi_latent_attention.MLASelfAttention._resolve_qk_norm_config",
}


@dataclass
class Usage:
    """What one file of the backend uses of megatron."""

    imported: dict[str, str] = field(default_factory=dict)  # name here -> dotted name there
    calls: list[tuple[str, ast.Call]] = field(default_factory=list)  # dotted name
    attributes: set[tuple[str, str]] = field(default_factory=set)  # (dotted name, attribute that it has)
    overrides: set[tuple[str, str]] = field(default_factory=set)  # (base class, method)


class Release:
    """The sources of a release."""

    def __init__(self, root: Path) -> None:
        """root: the directory that holds megatron/core."""
        self.root = root

    def tree(self, module: str) -> ast.Module | None:
        """The parsed module, None if there is none."""
        path = self.root.joinpath(*module.split("."))
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return _parse(file)
        return None

    def is_package(self, module: str) -> bool:
        return self.root.joinpath(*module.split("."), "__init__.py").is_file()

    def find(self, dotted: str) -> tuple[str, ast.AST] | None:
        """(module, definition) of a dotted name, through re-exports; None where it is missing."""
        if (tree := self.tree(dotted)) is not None:
            return dotted, tree
        module, _, name = dotted.rpartition(".")
        if not module or (tree := self.tree(module)) is None:
            return None
        found: tuple[str, ast.AST] | None = None
        for node in _statements(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
                return module, node
            if isinstance(node, ast.Assign | ast.AnnAssign) and name in _assigned(node):
                found = module, node
            if isinstance(node, ast.ImportFrom) and found is None:
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        source = self._absolute(module, node)
                        # From elsewhere (torch): the name is there, which is all that can be said.
                        found = self.find(f"{source}.{alias.name}") if source.startswith("megatron") else (module, node)
        return found

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = module.split(".")
        parts = parts[: len(parts) - node.level + self.is_package(module)]
        return ".".join([*parts, node.module] if node.module else parts)

    def bases(self, module: str, node: ast.ClassDef) -> Iterator[tuple[str, ast.ClassDef]]:
        """The class and its base classes within megatron, nearest first."""
        yield module, node
        for base in node.bases:
            base = base.value if isinstance(base, ast.Subscript) else base
            found = self.find(f"{module}.{base.id}") if isinstance(base, ast.Name) else None
            if found and isinstance(found[1], ast.ClassDef):
                yield from self.bases(found[0], found[1])

    def has_attribute(self, dotted: str, attribute: str) -> bool:
        """Of a module or a class: a definition, an assignment, or an assignment to self."""
        found = self.find(dotted)
        if found is None:
            return False
        module, node = found
        if isinstance(node, ast.Module):
            return self.find(f"{dotted}.{attribute}") is not None
        if not isinstance(node, ast.ClassDef):
            return True  # a value: its attributes cannot be seen
        return any(attribute in _members(owner) for _, owner in self.bases(module, node))

    def signature(self, dotted: str) -> ast.arguments | frozenset[str] | None:
        """Parameters of a function or a constructor, fields of a dataclass; None where they cannot be seen."""
        found = self.find(dotted)
        if found is None:
            return None
        module, node = found
        if isinstance(node, ast.FunctionDef):
            return node.args
        if not isinstance(node, ast.ClassDef):
            return None
        if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
            owners = [owner for _, owner in self.bases(module, node)]
            return frozenset(
                statement.target.id
                for owner in owners
                for statement in owner.body
                if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
            )
        for _, owner in self.bases(module, node):
            for statement in owner.body:
                if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
                    return statement.args
        return None


def read_usage(path: Path) -> Usage:
    """What the file imports from megatron, calls, overrides and replaces."""
    tree, usage = ast.parse(path.read_text(encoding="utf-8")), Usage()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "megatron":
            usage.imported |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in usage.imported:
            usage.attributes.add((usage.imported[node.value.id], node.attr))
        if isinstance(node, ast.Call) and (name := _called(node.func, usage.imported)):
            usage.calls.append((name, node))
        if isinstance(node, ast.ClassDef):
            for base in node.bases:
                if isinstance(base, ast.Name) and base.id in usage.imported:
                    usage.overrides |= {
                        (usage.imported[base.id], method.name)
                        for method in node.body
                        if isinstance(method, ast.FunctionDef) and method.name not in ("__init__", "forward")
                    }
    return usage


def check(release: Release, backend: Path = BACKEND) -> list[str]:
    """What the backend uses and the release lacks, one sentence each."""
    problems = []
    for path in sorted(backend.glob("*.py")):
        usage = read_usage(path)
        wanted = set(usage.imported.values())
        problems += [
            f"{path.name}: no {name}" for name in sorted(wanted) if not release.find(name) and name not in OPTIONAL
        ]
        for name, attribute in sorted(usage.attributes | usage.overrides):
            if not OPTIONAL.isdisjoint({name, f"{name}.{attribute}"}) or not release.find(name):
                continue
            if not release.has_attribute(name, attribute):
                problems.append(f"{path.name}: {name} has no {attribute}")
        for name, call in usage.calls:
            problems += [f"{path.name}: {name}() {problem}" for problem in _misfits(release, name, call)]
    return problems + _check_rewritten(release, backend / "cpu.py") + _check_configuration(release, backend)


def _misfits(release: Release, name: str, call: ast.Call) -> list[str]:
    """What a call passes that the function does not take, and what it needs and does not get."""
    signature, positional = release.signature(name), len(call.args)
    keywords = {keyword.arg for keyword in call.keywords if keyword.arg}
    if signature is None:
        return []
    if isinstance(signature, frozenset):
        return [f"has no field {keyword}" for keyword in sorted(keywords - signature)]
    names = [argument.arg for argument in (*signature.posonlyargs, *signature.args)]
    names = names[1:] if names[:1] == ["self"] else names
    known = {*names, *(argument.arg for argument in signature.kwonlyargs)}
    problems = [f"takes no {k}" for k in sorted(keywords - known)] if signature.kwarg is None else []
    if positional > len(names) and signature.vararg is None:
        problems.append(f"takes {len(names)} positional arguments, not {positional}")
    if any(isinstance(a, ast.Starred) for a in call.args) or any(keyword.arg is None for keyword in call.keywords):
        return problems  # what a * or ** brings cannot be seen
    required = names[positional : len(names) - len(signature.defaults)]
    required += [a.arg for a, default in zip(signature.kwonlyargs, signature.kw_defaults) if default is None]
    return problems + [f"needs {needed}" for needed in required if needed not in keywords]


def _check_rewritten(release: Release, cpu: Path) -> list[str]:
    """The modules whose constants cpu.py rewrites: they are there and still name CUDA."""
    (modules,) = (
        ast.literal_eval(node.value)
        for node in ast.parse(cpu.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and _assigned(node) == {"_MODULES_NAMING_CUDA"}
    )
    problems = []
    for module in modules:
        tree = release.tree(module)
        if tree is None:
            problems.append(f"{cpu.name}: no {module}, where constants are rewritten")
        elif not any(
            isinstance(n, ast.Constant) and n.value in ("cuda", "torch.cuda.FloatTensor") for n in ast.walk(tree)
        ):
            problems.append(f"{cpu.name}: {module} names CUDA no more")
    return problems


def _check_configuration(release: Release, backend: Path) -> list[str]:
    """The keys of transformer_config.py's dictionaries, which become fields of the configuration."""
    fields = release.signature("megatron.core.transformer.MLATransformerConfig")
    assert isinstance(fields, frozenset), "MLATransformerConfig is a dataclass"
    tree = ast.parse((backend / "transformer_config.py").read_text(encoding="utf-8"))
    keys = {k.value for n in ast.walk(tree) if isinstance(n, ast.Dict) for k in n.keys if isinstance(k, ast.Constant)}
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "config_class"]
    keys |= {keyword.arg for call in calls for keyword in call.keywords if keyword.arg}
    keys -= {"float32", "bfloat16"}  # of model.dtype
    return [f"transformer_config.py: MLATransformerConfig has no {key}" for key in sorted(keys - fields)]


@cache
def _parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _called(function: ast.expr, imported: dict[str, str]) -> str | None:
    """The dotted name of a called name, or of an attribute of an imported module."""
    if isinstance(function, ast.Name):
        return imported.get(function.id)
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
        module = imported.get(function.value.id)
        return None if module is None else f"{module}.{function.attr}"
    return None


def _statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """Of a module, those under `try`, `if` and `with` too."""
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        node = pending.pop(0)
        yield node
        if isinstance(node, ast.Try | ast.If | ast.With):
            pending += [child for child in ast.walk(node) if isinstance(child, ast.stmt) and child is not node]


def _assigned(node: ast.Assign | ast.AnnAssign) -> set[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}


def _members(owner: ast.ClassDef) -> set[str]:
    """Methods, class attributes, and what methods assign to self."""
    members = {node.name for node in owner.body if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(owner):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            members |= _assigned(node)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            members.add(node.attr)
    return members


def installed_root() -> Path:
    """The directory that holds the installed megatron/core."""
    spec = importlib.util.find_spec("megatron.core")
    if spec is None or spec.origin is None:
        sys.exit("megatron-core is not installed; name a directory that holds megatron/core")
    return Path(spec.origin).parents[2]


def main() -> int:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else installed_root()
    if not (root / "megatron" / "core").is_dir():
        sys.exit(f"{root} holds no megatron/core")
    problems = check(Release(root))
    print("\n".join(problems) if problems else "everything that the backend uses is there")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
