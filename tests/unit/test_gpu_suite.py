"""tools/gpu_suite.py: its arithmetic, and records of parts that work, fail, hang or do not fit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "tools"))

from gpu_suite import Part, Place, allot, read_json, read_junit, run_suite, shown
from gpu_suite_models import Shape, Sizes, data_sheet_tflops, mfu, step_flops


def part(name: str, code: str, *, limit: float = 60, packages: tuple[str, ...] = ()) -> Part:
    """Runs Python code; `result` is where its result goes."""

    def command(place: Place) -> list[str]:
        return [sys.executable, "-c", f"result = {str(place.work / name)!r} + '.result'\n{code}"]

    return Part(name, name, limit, 1, packages, command, read_json)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    for name in ("work", "output"):
        (tmp_path / name).mkdir()
    return Place(tmp_path / "work", tmp_path / "output", tiny=True)


@pytest.mark.parametrize(("left", "seconds"), [(1000, 300), (300, 300), (90, 90), (89.9, None), (-5, None)])
def test_a_part_gets_its_limit_or_what_is_left(left: float, seconds: float | None):
    assert allot(Part("p", "", 300, 90, (), lambda place: [], read_json), left) == seconds


def test_every_part_leaves_its_record_and_the_next_one_runs(place: Place):
    parts = [
        part("fails", "open(result, 'w').write('[1]'); print('boom'); raise SystemExit(3)"),
        part("hangs", "import time; time.sleep(600)", limit=1),
        part("absent", "", packages=("json", "no_such_package", "no_such.package")),
        part("works", "open(result, 'w').write('{\"a\": 2}')"),
    ]
    run_suite(parts, place, 1000, always=True)
    records = {name: json.loads((place.output / f"{name}.json").read_text()) for name in ("fails", "hangs", "works")}
    assert [record["status"] for record in records.values()] == [
        "failed with exit code 3",
        "timed out after 1 s",
        "done",
    ]
    assert [record["result"] for record in records.values()] == [[1], None, {"a": 2}]  # also of a part that failed
    assert records["fails"]["tail"] == "boom\n"
    assert "nothing more" in records["works"]["note"] and str(place.work) not in records["works"]["command"]
    absent = json.loads((place.output / "absent.json").read_text())
    assert absent["status"] == "not installed: no_such_package, no_such.package"


def test_what_does_not_fit_is_skipped_and_an_earlier_result_stays(place: Place):
    (place.output / "earlier.json").write_text("{}")
    records = run_suite([part("new", ""), part("earlier", "")], place, 0.5, always=True)
    assert [record["status"] for record in records] == ["skipped: 0 s are left, and it needs 1"] * 2
    assert json.loads((place.output / "new.json").read_text())["status"].startswith("skipped")
    assert (place.output / "earlier.json").read_text() == "{}"


def test_junit_counts(tmp_path: Path):
    cases = (
        "<testcase classname='m' name='a' time='1.5'/>"
        "<testcase classname='m' name='b'><failure message='no'/></testcase>"
        "<testcase classname='m' name='c'><skipped message='why'/></testcase>"
    )
    (tmp_path / "x").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    found = read_junit(tmp_path / "x")
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 1, 1)
    assert found["tests"][1] == {"test": "m::b", "outcome": "failed", "seconds": 0.0, "message": "no"}


def test_flops_by_hand():
    # One layer of 2 heads of 2 and 1 key/value head: q 4x4, k and v 4x2 each, o 4x4, and 3 matrices of 4x8.
    shape = Shape(4, 8, 1, 2, 1, 10, False, "")
    assert shape.layer_weights == 16 + 2 * 8 + 16 + 3 * 32
    sizes = Sizes(3, 2, 2, 2, 1, 1, 1, 1, 0, (), "float32")
    assert sizes.lengths == [5, 5, 5] and sizes.loss_tokens == 2 * 2 + 1 * 2
    flops = step_flops(shape, sizes.lengths, sizes.loss_tokens)
    assert flops["layers"] == 6 * 144 * 15 and flops["head"] == 6 * 40 * 6
    # Two products of 2 x head x heads FLOPs for each pair of positions, half of which are hidden; backward twice that.
    assert flops["attention"] == 3 * (2 * 2 * 4 * 25 / 2) * 3
    assert flops["sum"] == flops["layers"] + flops["head"] + flops["attention"]


def test_mfu_by_hand():
    assert mfu(4e14, 2.0, 800.0, 1000.0) == {
        "tflops_per_second": 200.0,
        "of_measured_matmul": 0.25,
        "of_data_sheet": 0.2,
    }
    assert mfu(4e14, 2.0, None, None)["of_measured_matmul"] is None
    names = ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA H200", "NVIDIA L4")
    assert [data_sheet_tflops(name) for name in names] == [989, 756, 989, None]


@pytest.mark.slow
def test_the_parts_run_on_a_cpu(tmp_path: Path):
    suite = Path(__file__).parents[2] / "tools" / "gpu_suite.py"
    parts = "train_0.5b,generate,offload,nccl"
    command = [sys.executable, suite, "--tiny", "--parts", parts, "--output", tmp_path]
    outcome = subprocess.run(command, check=False, capture_output=True, text=True)
    records = {path.stem: json.loads(path.read_text())["status"] for path in tmp_path.glob("*.json")}
    assert records == dict.fromkeys(["peaks", *parts.split(",")], "done"), outcome.stdout


def test_paths_are_named_and_relative_ones_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", ".::/somewhere/else")
    place = Place(tmp_path / "work", tmp_path / "output", tiny=True)
    text = f"{tmp_path}/work/a.log 0.5 /somewhere/else/b.py"
    assert shown(text, place) == "WORK/a.log 0.5 PYTHONPATH/b.py"
