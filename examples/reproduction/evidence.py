"""Write what an experiment has found: results.json, figures, and a page with the verdict on each claim of the paper."""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from claims import HELD_OUT, Results, findings, load_claims, missing_methods, rewards, runs_of, titled
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from seeds import Difference, Spread, paired_difference, spread

from chord_megatron.system.atomic import atomic_write
from chord_megatron.tracking.drawing import NUM_HUES, Panel, draw_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FOLDER = Path(__file__).parent
PANELS = {
    "eval_reward_mean": "Validation reward",
    "reward_mean": "Reward of rollouts",
    "eval_response_length_mean": "Length of validation answers (tokens)",
    "entropy": "Entropy of rollouts (nats)",
    "phi_mean": "phi of expert tokens",
    "mu": "mu",
}
DASHES = ("-", "--")


def write_evidence(results: Results, folder: Path) -> list[Path]:
    """Returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = {titled(results, method): line(place) for place, method in enumerate(results["methods"])}
    legend = [(name, color, dashes) for name, (color, dashes) in lines.items()]
    panels = [curves_panel(results, key, name) for key, name in PANELS.items()]
    below = "Means over the seeds; between two evaluations, of what steps measure, the mean over these."
    files = {
        "results.json": f"{json.dumps(results, indent=1)}\n".encode(),
        "README.md": page(results).encode(),
        "curves.png": draw_picture(panels, results["title"], below, legend),
    }
    if "sft" in results["methods"]:
        files["sft.png"] = draw_picture(sft_panels(results), "SFT: shift, readapt, overfit?", "A line for each seed.")
    for name, content in files.items():
        atomic_write(folder / name, [content])
    return [folder / name for name in files]


def line(place: int) -> tuple[str, str]:
    """Colour and dashes of a method, by its place."""
    return f"C{place % NUM_HUES}", DASHES[place // NUM_HUES]


def page(results: Results) -> str:
    """The text, all of whose numbers come from the results."""
    environment = Environment(
        loader=FileSystemLoader(FOLDER), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"spread": shown_spread, "difference": shown_difference, "wrap": wrapped}
    environment.filters |= {"item": partial(wrapped, indent="- "), "versions": shown_versions}
    template, claims = environment.get_template("page.md.j2"), load_claims()
    return template.render(
        results=results,
        sources=list(results["base"]["reward"]),
        rows=[row(results, method) for method in ("base", *results["methods"])],
        differences=[difference_row(results, *pair) for pair in pairs(results)],
        winners=[winner(results, source) for source in results["base"]["reward"]] if all(sides(results)) else [],
        at_an_edge=at_an_edge(results),
        not_run=[claim.sentence for claim in claims.claims if missing_methods(results, claim)],
        findings=findings(results, claims.claims),
        not_testable=claims.not_testable,
    )


def row(results: Results, method: str) -> dict[str, Any]:
    """One line of the table."""
    runs, is_base = runs_of(results, method), method == "base"
    return {
        "title": titled(results, method),
        "rewards": [spread(rewards(results, method, source)) for source in results["base"]["reward"]],
        "length": fmean(run["length"][HELD_OUT] for run in runs),
        "style": fmean(run["in_expert_style"][HELD_OUT] for run in runs),
        "steps": None if is_base else fmean(run["steps"] for run in runs),
        "rollout_tokens": None if is_base else fmean(run["rollout_tokens"] for run in runs),
        "expert_tokens": None if is_base else fmean(run["expert_tokens"] for run in runs),
        "evaluations": None
        if is_base
        else [fmean(of_stage) for of_stage in zip(*(run["evaluations"] for run in runs))],
        "lr": None if is_base else shown_lr(results["methods"][method]),
    }


def shown_versions(made_with: Sequence[str]) -> str:
    """Of all runs: their commits together where all else is the same; + where more was changed."""
    commits: dict[str, list[str]] = {}
    for line in made_with:
        found = re.search(r", commit (\w{12})\w*(\+?)", line)
        commits.setdefault(line.replace(found[0], "") if found else line, []).append(
            found[1] + found[2] if found else ""
        )
    return "; ".join(f"{rest} (commit {', '.join(sorted(of))})" if any(of) else rest for rest, of in commits.items())


def shown_lr(method: Mapping[str, Any]) -> str:
    """Of both stages, where there are two."""
    return ", then ".join(f"{lr:g}" for lr in (method["first_lr"], method["lr"]) if lr is not None)


def wrapped(text: str, indent: str = "") -> str:
    """As a paragraph, or as an item of a list."""
    width, following = 118 + len(indent), " " * len(indent)
    options = {"initial_indent": indent, "subsequent_indent": following}
    return textwrap.fill(" ".join(text.split()), width, break_long_words=False, break_on_hyphens=False, **options)


def winner(results: Results, source: str) -> str:
    """CHORD's best form beside the best of the others, by validation, on one part of the test set."""
    ours, others = (max(side, key=lambda name: validation(results, name)) for side in sides(results))
    found = paired_difference(*([100 * value for value in rewards(results, side, source)] for side in (ours, others)))
    said = {1: "CHORD is ahead", 0: "no difference is shown", -1: "CHORD is behind"}[found.sign]
    means = [
        f"{titled(results, side)} (lr {shown_lr(results['methods'][side])}) "
        f"{100 * fmean(rewards(results, side, source)):.1f}"
        for side in (ours, others)
    ]
    base = f"base {100 * results['base']['reward'][source]:.1f}"
    return f"*{source}*: {base}, {means[0]}, {means[1]}, difference {shown_difference(found)}: {said}"


def validation(results: Results, method: str) -> float:
    """The mean over the seeds, of the checkpoints that are tested."""
    return fmean(run["validation"] for run in runs_of(results, method))


def sides(results: Results) -> tuple[list[str], list[str]]:
    """CHORD's forms, and the other methods."""
    ours = [name for name, method in results["methods"].items() if method["is_chord"]]
    return ours, [name for name in results["methods"] if name not in ours]


def at_an_edge(results: Results) -> list[str]:
    """The methods whose learning rate is the lowest or the highest of the grid: others may be better."""
    grid = [float(lr) for lr in results["grid"]]
    edges = {min(grid), max(grid)}
    return [method["title"] for method in results["methods"].values() if edges & {method["lr"], method["first_lr"]}]


def pairs(results: Results) -> list[tuple[str, str]]:
    """CHORD's forms beside every method that is not one of them, then beside one another."""
    ours, others = sides(results)
    others = ["base", *others]
    among = [(b, a) for index, a in enumerate(ours) for b in ours[index + 1 :]]
    return [*((name, other) for name in ours for other in others), *among]


def difference_row(results: Results, ours: str, theirs: str) -> tuple[str, list[Difference]]:
    """On each part of the test set."""
    found = [
        paired_difference(*([100 * value for value in rewards(results, side, source)] for side in (ours, theirs)))
        for source in results["base"]["reward"]
    ]
    return f"{titled(results, ours)} - {titled(results, theirs)}", found


def shown_spread(value: Spread) -> str:
    """In percent."""
    return f"{100 * value.mean:.1f}" + (f" ± {100 * value.sd:.1f}" if value.sd else "")


def shown_difference(value: Difference) -> str:
    """With its interval, bold where that leaves 0 out; of one seed there is none."""
    has_interval = math.isfinite(value.low)
    digits = 1 if max(map(abs, value if has_interval else value[:1])) >= 1 else 3
    if not has_interval:
        return f"{value.mean:+.{digits}f}"
    text = f"{value.mean:+.{digits}f} [{value.low:+.{digits}f}, {value.high:+.{digits}f}]"
    return f"**{text}**" if value.sign else text


def curves_panel(results: Results, key: str, name: str) -> Panel:
    """A metric over the tokens that had a loss: the mean over the seeds."""

    def draw(axis: Axes) -> None:
        for place, method in enumerate(results["methods"]):
            color, dashes = line(place)
            axis.plot(*mean_curve(runs_of(results, method), key), color=color, linestyle=dashes, linewidth=1.4)

    return Panel(name, draw, "thousand tokens with a loss")


def mean_curve(runs: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """By evaluation, those that all seeds have come to: thousands of tokens, and the mean of the metric."""
    columns = [[(t, v) for t, v in zip(run["curves"]["tokens"], run["curves"][key], strict=True)] for run in runs]
    tokens, values = [], []
    for points in zip(*columns, strict=False):
        known = [value for _, value in points if value is not None]
        if len(known) == len(points):
            tokens.append(fmean(token for token, _ in points) / 1000)
            values.append(fmean(known))
    return tokens, values


def sft_panels(results: Results) -> list[Panel]:
    """SFT from each seed, beside what the policy could."""
    runs = runs_of(results, "sft")

    def panel(name: str, key: str, *, has_base: bool = False) -> Panel:
        def draw(axis: Axes) -> None:
            for run in runs:
                axis.plot(*mean_curve([run], key), linewidth=1)
            if has_base:
                axis.axhline(runs[0]["curves"][key][0], color="C6", linestyle=":", linewidth=1)

        return Panel(name, draw, "thousand expert tokens")

    return [
        panel("Validation reward (dotted: the policy)", "eval_reward_mean", has_base=True),
        panel("Length of validation answers (tokens)", "eval_response_length_mean", has_base=True),
        panel("Loss of expert rows (nats)", "loss_expert"),
    ]
