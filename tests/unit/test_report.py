"""The report of a run: what its page holds, that nothing in it runs or is fetched, and that its figures are legible."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import math
import re
import tomllib
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from typer.testing import CliRunner

from chord_megatron.cli import app
from chord_megatron.system.errors import UserError
from chord_megatron.tracking.completions import Completion, Completions, read_completions
from chord_megatron.tracking.drawing import DARK, LIGHT, draw_panel, panel_figure, picture_figure, style
from chord_megatron.tracking.expert_rows import Visit, expert_panels, most_moved, read_visits
from chord_megatron.tracking.plots import run_panels
from chord_megatron.tracking.report import write_report
from chord_megatron.tracking.run_log import RunLog
from chord_megatron.tracking.step_metrics import ExpertRow
from chord_megatron.tracking.summary import History, load_history

STEP = {
    "loss": 0.5,
    "loss_rollout": 0.0125,
    "loss_expert": 0.75,
    "mu": 0.35,
    "phi_mean": 0.125,
    "reward_mean": 0.4125,
    "entropy": 0.83,
    "expert_entropy": 0.5,
    "kl": 0.01,
    "response_length_mean": 12_345.0,
    "truncated_fraction": 0.5,
    "grad_norm": 1.5,
    "grad_norm_rollout": 1.0,
    "grad_norm_expert": 2.0,
    "gradient_cosine": -0.25,
    "log_prob_diff_max": 0.001,
    "log_prob_diff_mean": 0.00001,
    "effective_sample_size": 0.9,
    "tokens_per_second": 12345.0,
    "num_rollout_tokens": 100,
    "num_expert_tokens": 20,
    "time_rollout": 6.0,
    "time_reward": 0.5,
    "time_log_probs": 0.25,
    "time_train": 3.0,
    "time_sync": 0.25,
    "time_step": 11.0,
}
ALL_PANELS = [
    "Reward",
    "Loss",
    "Expert weight",
    "Entropy and KL",
    "Completions",
    "Gradient norm",
    "Sampler vs trainer",
    "Time of a step",
    "Throughput",
]
# What supervised steps log: no completion, and a rollout loss of 0 that is no measurement.
SUPERVISED = STEP | {"mu": 1.0, "loss": 0.75, "loss_rollout": 0.0, "num_rollout_tokens": 0} | dict.fromkeys(
    ("reward_mean", "entropy", "kl", "response_length_mean", "truncated_fraction", "log_prob_diff_max",
     "log_prob_diff_mean", "effective_sample_size", "grad_norm_rollout", "gradient_cosine")
)  # fmt: skip
HOSTILE = [
    "</script><script>document.title = 'run'</script>",
    "<img src=x onerror=\"document.title = 'run'\">",
    "<!--<script>",
    "\u2028\u2029 line separators",
    "a NUL \0 and a lone surrogate \ud83d",
    "{{ 7 * 7 }} & &lt;b&gt; ' \" `${7 * 7}`",
]


class Page(HTMLParser):
    """The elements of a page: (tag, attributes, the text with which it begins)."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], str]] = []
        self.is_within = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), ""))
        self.is_within = True

    def handle_endtag(self, tag: str) -> None:
        self.is_within = False

    def handle_data(self, data: str) -> None:
        if self.is_within:
            tag, attributes, text = self.elements[-1]
            self.elements[-1] = (tag, attributes, text + data)

    def of(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(attributes, text) for name, attributes, text in self.elements if name == tag]

    def data(self) -> list[list[Any]]:
        (text,) = [text for attributes, text in self.of("script") if attributes.get("id") == "completion-data"]
        return json.loads(text)


def open_log(run_dir: Path) -> RunLog:
    return RunLog(run_dir, train_iters=10, report_to=(), stream=io.StringIO())


def write_run(run_dir: Path, steps: int = 2, metrics: dict[str, Any] = STEP, texts: list[str] | None = None) -> Path:
    """A run with one completion a step, or those given at its only logged step."""
    with open_log(run_dir) as log:
        for step in range(steps):
            log.log_step({"step": step, **metrics})
            if texts is None:
                log.log_completions(step, [{"prompt": f"p{step}", "completion": "c", "reward": step / 8}])
        log.log_completions(0, [{"prompt": text, "completion": text, "reference<b>": text} for text in texts or []])
    return run_dir


def page_of(run_dir: Path) -> str:
    return write_report(run_dir)[1].read_text("utf-8")


def history(metrics: dict[str, Any], steps: int = 30) -> History:
    return History(tuple({"step": step, **metrics} for step in range(steps)), ({"step": 0, "eval_reward_mean": 0.5},))


def box_of(artist: Any, figure: Figure) -> Bbox:
    return artist.get_window_extent(figure.canvas.get_renderer())  # type: ignore[attr-defined]


def overlapping(boxes: list[Bbox]) -> list[tuple[Bbox, Bbox]]:
    return [(a, b) for a, b in itertools.combinations(boxes, 2) if a.overlaps(b)]


VISITS = [Visit(step, row, -2.0 + step / 8, 0.5, -step / 8) for step in range(4) for row in range(8)]


@pytest.mark.parametrize("panel", [*run_panels(history(STEP)), *expert_panels(VISITS)], ids=lambda panel: panel.title)
def test_nothing_in_a_panel_overlaps(panel: Any) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with mpl.rc_context(style(LIGHT)):
        figure = panel_figure(panel)
        FigureCanvasAgg(figure).draw()
    axis = figure.axes[0]
    title = axis.title if axis.title.get_text() else axis._left_title  # type: ignore[attr-defined]
    assert title.get_text() == panel.title
    boxes = [box_of(title, figure), axis.bbox]
    if axis.get_legend() is not None:
        boxes.append(box_of(axis.get_legend(), figure))
    boxes += [box_of(each.yaxis.label, figure) for each in figure.axes if each.yaxis.label.get_text()]
    boxes.append(box_of(axis.xaxis.label, figure))
    assert axis.bbox.width > figure.bbox.width / 2  # what stands beside it leaves it room
    assert overlapping(boxes) == []
    assert [box for box in boxes if not (figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1)] == []
    assert [box for box in boxes if not (figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1)] == []


def test_nothing_in_the_picture_overlaps() -> None:
    """Also under a name that looks like mathematics, and one that fills a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    panels = run_panels(history(STEP))
    assert [panel.title for panel in panels] == ALL_PANELS
    with mpl.rc_context(style(LIGHT)):
        legend_rows = [("_a $" + "a" * 30 + "$", "C0", "-"), ("b", "C1", "--")]
        figure = picture_figure(panels, "$x_1$ " * 10, "said\nsaid", legend_rows)
        FigureCanvasAgg(figure).draw()
    for axis in figure.axes:
        if axis.get_legend() is not None:
            assert not box_of(axis._left_title, figure).overlaps(box_of(axis.get_legend(), figure))  # type: ignore[attr-defined]
    places: dict[Any, list[Bbox]] = {}
    for axis in figure.axes:  # the two of a panel with a right scale have one place
        places.setdefault(axis.get_subplotspec().num1, []).append(axis.get_tightbbox())  # type: ignore[arg-type, union-attr]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [name for name, _, _ in legend_rows]
    texts = [text for text in (figure._suptitle, figure._supxlabel) if text is not None]  # type: ignore[attr-defined]
    assert len(places) == 9
    assert overlapping([*map(Bbox.union, places.values()), *(box_of(text, figure) for text in (*texts, legend))]) == []


def test_a_supervised_run_has_no_empty_panel_and_no_loss_of_rollouts() -> None:
    panels = run_panels(history(SUPERVISED))
    assert [panel.title for panel in panels] == [
        "Reward", "Loss", "Expert weight", "Entropy", "Gradient norm", "Time of a step", "Throughput",
    ]  # fmt: skip
    without_evaluation = History(history(SUPERVISED).steps, ())
    assert run_panels(without_evaluation)[0].title == "Loss"
    figure = panel_figure(panels[1])
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["expert (SFT)", "total"]


def test_a_panel_is_drawn_in_both_themes() -> None:
    light, dark = (set(re.findall("#[0-9a-f]{6}", svg.decode())) for svg in draw_panel(run_panels(history(STEP))[0]))
    assert {LIGHT.paper, LIGHT.ink, LIGHT.grid, LIGHT.cycle[4]} <= light <= set(LIGHT.colors)
    assert dark == {DARK.colors[LIGHT.colors.index(color)] for color in light}


@pytest.mark.attack
def test_a_hostile_run_adds_no_element_and_nothing_that_runs(tmp_path: Path) -> None:
    texts = [*HOSTILE, "<b>" + "x" * 10**6]
    write_run(tmp_path / "<b>run", texts=texts)
    (tmp_path / "<b>run" / "config.yaml").write_text("model: '<img src=x onerror=1>\0'\n")
    page = Page(page_of(tmp_path / "<b>run"))
    harmless = Page(page_of(write_run(tmp_path / "other", texts=["x"] * len(texts))))
    configuration = ["h2", "details", "summary", "pre"]  # the other run has none
    assert sorted(e[0] for e in page.elements) == sorted([*(e[0] for e in harmless.elements), *configuration])
    assert [attributes for _, attributes, _ in page.elements if any(n.startswith("on") for n in attributes)] == []
    assert page.of("h1")[0][1] == "<b>run" and page.of("title")[0][1] == "<b>run"
    rows = page.data()
    for text, (step, is_eval, reward, facts, shown) in zip(HOSTILE, rows):
        assert (step, is_eval, reward) == (0, False, None)
        assert (facts, shown) == (f"reference<b>: {text}", [["prompt", text], ["completion", text]])
    assert len(rows[-1][4][1][1]) < 20_100 and "characters …]" in rows[-1][4][1][1]
    assert "[… 980,003 characters …]" in rows[-1][4][0][1]
    assert page.of("pre")[0][1] == HOSTILE[0]


def test_the_page_fetches_nothing_and_runs_its_own_script_alone(tmp_path: Path) -> None:
    page = Page(page_of(write_run(tmp_path)))
    policy = next(a["content"] or "" for a, _ in page.of("meta") if a.get("http-equiv") == "Content-Security-Policy")
    (script,) = [text for attributes, text in page.of("script") if not attributes]
    (css,) = [text for _, text in page.of("style")]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (css, script)]
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )
    addresses = [a[name] or "" for _, a, _ in page.elements for name in ("src", "href", "srcset") if name in a]
    assert len(addresses) == 2 * 9 and all(each.startswith("data:image/svg+xml;base64,") for each in addresses)
    assert not re.search(r"url\(|@import|//", css) and "style" not in {n for _, a, _ in page.elements for n in a}


def test_each_panel_is_there_light_and_dark(tmp_path: Path) -> None:
    page = Page(page_of(write_run(tmp_path)))
    assert [attributes["alt"] for attributes, _ in page.of("img")] == [
        f"{title}, over the steps" for title in ALL_PANELS
    ]
    assert [attributes["media"] for attributes, _ in page.of("source")] == ["(prefers-color-scheme: dark)"] * 9


def test_all_completions_are_in_the_page_and_the_ends_without_its_script(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.log_step({"step": 0, **STEP})
        for step in range(1250):
            split = {"split": "eval"} if step in (3, 5, 8) else {}
            rows = [{"prompt": f"p{step}/{i}", "completion": "c", "reward": i / 4, **split} for i in range(8)]
            log.log_completions(step, rows)
    page = Page(page_of(tmp_path))
    rows = page.data()
    assert len(rows) == 10_000
    assert rows[8 * 5 + 2] == [5, True, 0.5, "reward: 0.5", [["prompt", "p5/2"], ["completion", "c"]]]
    assert [text for _, text in page.of("h3")] == [
        "Step 0",
        "Step 1249",
        "Evaluation at step 3",
        "Evaluation at step 8",
    ]
    prompts = [text for _, text in page.of("pre") if text.startswith("p")]
    assert prompts == [f"p{step}/{i}" for step in (0, 1249, 3, 8) for i in range(3)]


def test_completions_that_no_page_holds_are_of_steps_at_even_distances(tmp_path: Path) -> None:
    path = tmp_path / "completions.jsonl"
    path.write_text("".join(json.dumps({"step": step, "completion": "x" * 800}) + "\n" for step in range(9)))
    assert [row.step for row in read_completions(path).rows] == list(range(9))
    few = read_completions(path, most_characters=5_500)  # of 1,000 each
    assert ([row.step for row in few.rows], few.total) == ([0, 2, 4, 6, 8], 9)
    one = read_completions(path, most_characters=1_500)  # not even both ends
    assert ([row.step for row in one.rows], one.total) == ([0], 9)


def test_what_a_completion_says_of_itself() -> None:
    row = Completion(3, False, None, "", ())
    assert Completions((row, row, row), 3).ends(2) == [("Step 3", [row, row])]
    assert Completions((), 0).ends(2) == []


@pytest.mark.parametrize("reward", ['"<b>"', "NaN", "1e999", "true", "[1]", "null"])
def test_a_reward_that_is_no_number_is_none(tmp_path: Path, reward: str) -> None:
    (tmp_path / "completions.jsonl").write_text(f'{{"step": 0, "reward": {reward}}}\n')
    (row,) = read_completions(tmp_path / "completions.jsonl").rows
    assert row.reward is None


def test_expert_rows(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.log_step({"step": 0, **STEP})
        log.log_experts(0, [ExpertRow(7, -1.0, 0.5), ExpertRow(3, math.nan, math.nan), ExpertRow(4, -2.0, 1.0)])
        log.log_experts(2, [ExpertRow(7, -1.25, 0.25), ExpertRow(4, -1.0, 0.0), ExpertRow(5, -1.0, 1.0)])
        log.log_experts(4, [ExpertRow(7, -1.5, 0.0)])
    visits = read_visits(tmp_path / "experts.jsonl")
    assert visits[0] == Visit(0, 7, -1.0, 0.5, 0.0) and visits[5] == Visit(2, 5, -1.0, 1.0, 0.0)
    assert math.isnan(visits[1].log_prob) and len(visits) == 7
    gained, lost = most_moved(visits)  # 5 was seen once, 3 never
    assert (gained.id, gained.visits, gained.first, gained.last, gained.phi) == (4, 2, -2.0, -1.0, 0.0)
    assert (lost.id, lost.visits, lost.first, lost.last) == (7, 3, -1.0, -1.5)
    assert (lost.line, lost.start) == ("5.0,5.0 100.0,22.0 195.0,39.0", 5.0)  # from top left to bottom right
    assert lost.points[2] == (195.0, 39.0, to_hex(colormaps["plasma"](0.3)))
    assert gained.points[0][2] == to_hex(colormaps["plasma"](0.85))
    page = Page(page_of(tmp_path))
    assert [a["alt"] for a, _ in page.of("img")][-2:] == [
        "Expert rows, over the steps",
        "Expert rows: log-prob lost, over the steps",
    ]
    assert [text for _, text in page.of("td")][-7:-1] == ["7", "3", "-1.000", "-1.500", "+0.500", "0.000"]


def test_points_of_expert_rows_are_bounded() -> None:
    visits = [Visit(step, step, -1.0, 0.5, 0.25) for step in range(9_000)]
    panels = expert_panels(visits)
    figure = panel_figure(panels[1])
    assert figure.axes[0].collections[0].get_offsets().tolist()[:2] == [[0.0, 0.25], [3.0, 0.25]]
    assert len(figure.axes[0].collections[0].get_offsets()) == 3_000
    assert expert_panels([Visit(0, 1, math.nan, 0.5, 0.25)]) == []


@pytest.mark.parametrize(
    "row", ['{"step": 0}', '{"step": 0, "id": 1, "phi": "x"}', '{"step": 0, "id": 1, "shift": 1e999}']
)
def test_a_damaged_line_of_experts_is_named(tmp_path: Path, row: str) -> None:
    write_run(tmp_path)
    (tmp_path / "experts.jsonl").write_text(row + "\n")
    with pytest.raises(UserError, match=r"line 1 of .*experts.jsonl is no expert row"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists() and not (tmp_path / "report.png").exists()


@pytest.mark.parametrize("step", ['"<script>alert(1)</script>"', '["<script>"]', "1.5", "true", "null"])
def test_a_step_of_the_report_is_a_number(tmp_path: Path, step: str) -> None:
    write_run(tmp_path)
    (tmp_path / "completions.jsonl").write_text(f'{{"step": {step}, "prompt": "p", "completion": "c"}}\n')
    with pytest.raises(UserError, match=r"line 1 of .*completions.jsonl has no step \(an integer from 0 on\)"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_report(tmp_path: Path) -> None:
    write_run(tmp_path, steps=30)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "eval_reward_mean": 0.75}\n')
    (tmp_path / "config.yaml").write_text("model: '<img src=x>'\n")
    png, html = write_report(tmp_path)
    assert (png, html) == (tmp_path / "report.png", tmp_path / "report.html")
    assert png.read_bytes().startswith(b"\x89PNG")
    page = Page(html.read_text("utf-8"))
    assert ("0.7500 (step 30)") in [text for _, text in page.of("td")]
    assert page.of("pre")[-1][1] == "model: '<img src=x>'\n"
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("record", "panels"),
    [
        ({"step": 0, "loss": 0.5, "time_rollout": 1.0, "time_step": 2.0}, ["Loss", "Time of a step"]),
        ({"step": 3, "loss": None, "reward_mean": None, "kl": None, "time_step": None}, []),
        ({"step": 0, "eval_reward_mean": 0.5}, ["Reward"]),
        ({"step": 0, "eval_reward_mean": None}, []),
    ],
    ids=["single step", "nothing known", "evaluation only", "evaluation without reward"],
)
def test_report_of_a_sparse_run(tmp_path: Path, record: dict[str, Any], panels: list[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(record)}\n")
    assert [panel.title for panel in run_panels(load_history(tmp_path))] == panels
    page = page_of(tmp_path)
    assert f"<th>Training steps</th><td>{'loss' in record:d}</td>" in page
    assert ("<h2>Curves</h2>" in page) == bool(panels) and "<h2>Completions</h2>" not in page
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("named", "sentence"),
    [
        ("run/metrics.jsonl", "run/metrics.jsonl is a file; give the run's directory, {0}/run"),
        ("run/checkpoints/step_2/state.json", "state.json is a file; give the run's directory, {0}/run"),
        ("run/checkpoints", "checkpoints/metrics.jsonl does not exist; give the run's directory, {0}/run"),
        ("config.yaml", "config.yaml is a file; give the output directory of a training run"),
    ],
)
def test_what_is_inside_a_run_names_the_run(tmp_path: Path, named: str, sentence: str):
    for file in ("run/metrics.jsonl", "run/checkpoints/step_2/state.json", "config.yaml"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("{}")
    with pytest.raises(UserError) as error:
        write_report(tmp_path / named)
    assert str(error.value).endswith(sentence.format(tmp_path))


def test_report_without_metrics(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics.jsonl does not exist; give the output directory"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(UserError, match=r"metrics.jsonl is empty"):
        write_report(tmp_path)


def test_the_command_as_json(tmp_path: Path) -> None:
    write_run(tmp_path / "run", steps=6, metrics=STEP | {"mu": 0.0, "gradient_cosine": 0.5})
    result = CliRunner().invoke(app, ["report", str(tmp_path / "run"), "--json"])
    assert result.exit_code == 0
    said = json.loads(result.stdout)
    assert (said["run"], said["summary"]["steps"], said["summary"]["last_eval"]) == ("run", 6, None)
    assert said["findings"] == ["mu at 0 since step 0: experts are not trained on."]
    assert said["files"] == [str(tmp_path / "run" / name) for name in ("report.png", "report.html")]


def test_the_templates_are_in_the_wheel() -> None:
    root = Path(__file__).parents[2]
    setuptools = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    (patterns,) = [setuptools["package-data"]["chord_megatron.tracking"]]
    room = root / "chord_megatron" / "tracking"
    data = [
        str(path.relative_to(room)) for path in room.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    assert [name for name in data if not name.endswith(".py") and not any(fnmatch(name, p) for p in patterns)] == []
    assert "templates/report.html" in data
