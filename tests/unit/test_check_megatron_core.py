"""The static check of megatron-core: the installed release passes, and what is missing is named."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from check_megatron_core import Release, check, installed_root  # noqa: E402

MODULE = """
from dataclasses import dataclass

class Base:
    def __init__(self, size):
        self.size = size

    def method(self):
        pass

class Child(Base):
    pass

@dataclass
class Settings:
    known: int = 0

def function(first, *, known=None, must):
    pass
"""


def test_the_installed_release_has_what_the_backend_uses():
    assert check(Release(installed_root())) == []


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("from megatron.core.module import Child\nChild(1)", None),
        ("from megatron.core import module\nmodule.function(1, known=2, must=3)", None),
        ("from megatron.core.module import Gone", "user.py: no megatron.core.module.Gone"),
        ("from megatron.core.gone import function", "user.py: no megatron.core.gone.function"),
        ("from megatron.core import module\nmodule.gone = 1", "user.py: megatron.core.module has no gone"),
        (
            "from megatron.core.module import function\nfunction(1, must=2, other=3)",
            "user.py: megatron.core.module.function() takes no other",
        ),
        (
            "from megatron.core.module import function\nfunction(known=2, must=3)",
            "user.py: megatron.core.module.function() needs first",
        ),
        (
            "from megatron.core.module import function\nfunction(1)",
            "user.py: megatron.core.module.function() needs must",
        ),
        ("from megatron.core.module import function\nfunction(*[1], **{})", None),
        (
            "from megatron.core.module import Child\nChild(1, 2)",
            "user.py: megatron.core.module.Child() takes 1 positional arguments, not 2",
        ),
        (
            "from megatron.core.module import Settings\nSettings(other=1)",
            "user.py: megatron.core.module.Settings() has no field other",
        ),
        (
            "from megatron.core.module import Child\nclass A(Child):\n  def gone(self): pass\n  def method(self): pass",
            "user.py: megatron.core.module.Child has no gone",
        ),
    ],
)
def test_what_is_missing_is_named(code: str, problem: str | None, tmp_path: Path):
    core, backend = tmp_path / "megatron" / "core", tmp_path / "backend"
    for directory in (core / "transformer", backend):
        directory.mkdir(parents=True)
    (core / "__init__.py").touch()
    (core / "module.py").write_text(MODULE, encoding="utf-8")
    (core / "cuda.py").write_text("DEVICE = 'cuda'", encoding="utf-8")
    fields = "from dataclasses import dataclass\n@dataclass\nclass MLATransformerConfig:\n    size: int"
    (core / "transformer" / "__init__.py").write_text(fields, encoding="utf-8")
    (backend / "cpu.py").write_text("_MODULES_NAMING_CUDA = ('megatron.core.cuda',)", encoding="utf-8")
    (backend / "transformer_config.py").write_text("config_class(size=1)", encoding="utf-8")
    (backend / "user.py").write_text(code, encoding="utf-8")
    assert check(Release(tmp_path), backend) == ([] if problem is None else [problem])

    (backend / "cpu.py").write_text("_MODULES_NAMING_CUDA = ('megatron.core.module',)", encoding="utf-8")
    (backend / "transformer_config.py").write_text("config_class(other=1)", encoding="utf-8")
    assert check(Release(tmp_path), backend)[-2:] == [
        "cpu.py: megatron.core.module names CUDA no more",
        "transformer_config.py: MLATransformerConfig has no other",
    ]
