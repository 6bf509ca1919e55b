"""Which of a module's tests run, so that its fixtures prepare what these need, and nothing else."""

from __future__ import annotations

import pytest


def selected(request: pytest.FixtureRequest, *names: str) -> set[tuple[object, ...]]:
    """The values of these parameters in each selected test of the module that has them all."""
    of_module = [item for item in request.session.items if getattr(item, "module", None) is request.module]
    parameters = [item.callspec.params for item in of_module if hasattr(item, "callspec")]
    return {tuple(values[name] for name in names) for values in parameters if set(names) <= values.keys()}
