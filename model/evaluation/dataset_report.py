"""Shows the statistics of a dataset in the terminal, as an HTML page, and in MLflow."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from model.data.statistics import Distribution, Statistics
from model.evaluation.figures import ACCENT, font, save_figure
from model.evaluation.pages import figure_uri, render_page
from model.tracking import Run

BAR = 28
"""Length of the longest bar in the terminal, in characters."""
SPARKS = "▁▂▃▄▅▆▇█"


def print_statistics(found: Statistics, console: Console) -> None:
    """Tables in the terminal."""
    clips = sum(found.clips.values())
    console.print(
        f"[bold]{found.name}[/] {clips:,} clips, {found.hours:,.1f} hours, {found.source_bytes / 1e9:,.2f} GB as "
        f"published; stored as {found.form}"
    )
    splits = _table("split", "clips", "quarantined")
    for split, count in found.clips.items():
        splits.add_row(split, f"{count:,}", f"{found.quarantined[split]:,}")
    console.print(splits)
    spread = _table("", "5 %", "median", "95 %", "mean", "unit", "distribution")
    for item in found.distributions:
        numbers = (f"{value:,.4g}" for value in (item.low, item.median, item.high, item.mean))
        spread.add_row(item.name, *numbers, item.unit, _sparkline(item))
    console.print(spread)
    for title, counts in _counted(found).items():
        if counts:
            console.print(_bars(title, counts))


def publish_statistics(found: Statistics, run: Run) -> None:
    """Logs metrics, tables, figures and the page to an MLflow run."""
    dataset = found.name.partition("@")[0]
    run.metrics({f"{dataset}/clips_{split}": float(count) for split, count in found.clips.items()})
    run.metrics({f"{dataset}/quarantined_{split}": float(count) for split, count in found.quarantined.items()})
    run.metrics({f"{dataset}/hours": found.hours, f"{dataset}/gigabytes": found.source_bytes / 1e9})
    for title, counts in _counted(found).items():
        rows = [{title: name, "clips": count} for name, count in counts.most_common()]
        run.table(rows, f"{dataset}-{title.replace(' ', '-')}")
    with TemporaryDirectory() as folder:
        for name, figure in figures(found).items():
            path = Path(folder) / f"{dataset}-{name}.png"
            save_figure(figure, path)
            run.artifact(path)
        path = Path(folder) / f"{dataset}.html"
        path.write_text(statistics_page(found), encoding="utf-8")
        run.artifact(path)


def statistics_page(found: Statistics) -> str:
    """One self-contained page."""
    drawn = {name: figure_uri(figure) for name, figure in figures(found).items()}
    return render_page("statistics.html.j2", {"s": found, "supers": "", "categories": "", **drawn})


def figures(found: Statistics) -> dict[str, Figure]:
    """Figures by name. Category figures only if the dataset has categories."""
    drawn = {"distributions": _distribution_figure(found.distributions)}
    if found.categories:
        drawn["categories"] = _bar_figure(found.categories, 0.22)
        drawn["supers"] = _bar_figure(found.super_categories, 0.26)
    return drawn


def _counted(found: Statistics) -> Mapping[str, Counter[str]]:
    return {
        "super-category": found.super_categories,
        "category": found.categories,
        "resolution": Counter(dict(found.resolutions.most_common(12))),
        "quarantined because": found.reasons,
    }


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if 0 < number < 5 else "left", no_wrap=True)
    return table


def _bars(title: str, counts: Counter[str]) -> Table:
    table = _table(title, "clips")
    table.add_column("")
    top = max(counts.values())
    for name, count in counts.most_common():
        table.add_row(name, f"{count:,}", f"[cyan]{'█' * max(1, round(BAR * count / top))}[/]")
    return table


def _sparkline(item: Distribution) -> str:
    top = max(item.counts)
    return "".join(SPARKS[round(count / top * (len(SPARKS) - 1))] if count else " " for count in item.counts)


def _distribution_figure(distributions: list[Distribution]) -> Figure:
    figure = Figure(figsize=(11, 5), layout="constrained")
    for axes, item in zip(figure.subplots(2, 3).flat, distributions, strict=False):
        axes.stairs(item.counts, item.edges, fill=True, color=ACCENT, alpha=0.8)
        axes.axvline(item.median, color="#1f2933", linewidth=1)
        axes.set_title(f"{item.name}: median {item.median:,.4g} {item.unit}", fontsize=9, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    return figure


def _bar_figure(counts: Counter[str], row_height: float) -> Figure:
    names, values = zip(*reversed(counts.most_common()), strict=True)
    figure = Figure(figsize=(7, 0.6 + row_height * len(names)), layout="constrained")
    axes: Axes = figure.subplots()
    axes.barh(range(len(names)), values, color=ACCENT)
    axes.set_yticks(range(len(names)), names, font=font())
    axes.set_xlabel("clips")
    axes.spines[["top", "right"]].set_visible(False)
    for place, value in enumerate(values):
        axes.text(value, place, f" {value:,}", va="center", fontsize=8)
    return figure
