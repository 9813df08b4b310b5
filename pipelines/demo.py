"""The main job on one machine: `mplug demo` takes synthetic clips through the whole platform and shows the result."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from model import storage
from model.data.synthetic import synthesize
from model.exits import INTERRUPTED, StageError
from pipelines.services import BUCKET, Settings, services, stop

ROOT = f"s3://{BUCKET}/demo"
STAGE = re.compile(r"Task '([a-z-]+?)(-[0-9]+)?' finished with status (SUCCESS|FAILURE)")
PROGRESS = re.compile(r"[0-9]%\|.*(clip|file|step|batch)")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
console = Console(highlight=False)


def run(folder: Path, *, scale: float, overrides: list[str]) -> int:
    """Runs the demo in `folder`; returns 0, or 1 where a required result was missed."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MPLUG_CACHE", str(folder / "cache"))
    started = time.monotonic()
    with _interruptible():
        source = _corpus(folder, scale)
        console.print("[bold]starting S3 and MLflow[/]")
        with services(folder) as made:
            _run_pipeline(folder, source, made, overrides)
            report, results = _fetch_report(folder)
    missed = _print_results(results)
    minutes = (time.monotonic() - started) / 60
    console.print(f"\nreport   {report}\nMLflow   [bold]{_mplug()} ui {folder}[/]\ntook     {minutes:.1f} minutes")
    for row in missed:
        console.print(f"[red]missed:[/] {row['task']} {row['metric']} is {row['value']:.3f}, required {_bound(row)}")
    return 1 if missed else 0


def serve(folder: Path) -> None:
    """Runs S3 and MLflow on a demo's results until Ctrl-C."""
    if not (folder / "mlflow.db").exists():
        raise StageError(f"{folder} holds no demo. Run `mplug demo {folder}` first.")
    with _interruptible(), services(folder) as made:
        console.print(f"MLflow   [bold]{made.tracking_uri}[/]   (Ctrl-C stops it)")
        signal.pause()


def _corpus(folder: Path, scale: float) -> Path:
    """The synthetic dataset, made once: it appears when it is whole."""
    source, partial = folder / "source", folder / "source.partial"
    if not source.exists():
        shutil.rmtree(partial, ignore_errors=True)
        synthesize(partial, scale=scale)
        partial.rename(source)
    return source


def _run_pipeline(folder: Path, source: Path, made: Settings, overrides: list[str]) -> None:
    log = folder / "pipeline.log"
    command = [
        _mplug(), "pipeline", "run", str(source), ROOT, *overrides, "--tracking-uri", made.tracking_uri,
        "--folder", str(folder / "kfp"), "--run-name", "demo",
    ]  # fmt: skip
    console.print(f"[bold]running the pipeline[/], log in {log}")
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        assert child.stdout is not None
        with log.open("wb") as file:
            for line in child.stdout:
                file.write(line)
                file.flush()
                _show(line.decode(errors="replace").rstrip())
        if child.wait():
            raise StageError(f"the pipeline failed; {log} says why. `mplug demo` goes on where it stopped.")
    finally:
        stop(child)


def _show(line: str) -> None:
    """Shows the pipeline's progress; all of its output is in pipeline.log."""
    line = COLOUR.sub("", line).strip()
    if stage := STAGE.search(line):
        if not line.startswith("Task"):  # kfp prints every line twice, once with the time
            mark = "[green]✓[/]" if stage[3] == "SUCCESS" else "[red]✗[/]"
            console.print(f"{mark} {stage[1]}")
    elif PROGRESS.search(line) or line.startswith("error: "):
        print(f"  {line}", flush=True)


def _fetch_report(folder: Path) -> tuple[Path, list[dict[str, object]]]:
    """Copies the report out of S3, which stops with the demo."""
    reports = storage.join(ROOT, "reports")
    names = {Path(entry.path).name: storage.join(reports, entry.path) for entry in storage.walk(reports)}
    storage.download(names["report.html"], folder / "report.html")
    return folder / "report.html", json.loads(storage.read(names["results.json"]))


def _print_results(results: list[dict[str, object]]) -> list[dict[str, object]]:
    """Prints the table and returns the rows that were missed."""
    table = Table(title="results on the test splits", title_justify="left")
    for column in ("task", "metric"):
        table.add_column(column)
    for column in ("value", "without pre-training", "chance", "required"):
        table.add_column(column, justify="right")
    for row in results:
        chance = "–" if row["chance"] is None else f"{row['chance']:.3f}"
        value = f"[{'green' if row['passed'] else 'red'}]{row['value']:.3f}[/]"
        without = f"{row['without_pretraining']:.3f}"
        table.add_row(str(row["task"]), str(row["metric"]), value, without, chance, _bound(row))
    console.print(table)
    return [row for row in results if not row["passed"]]


def _bound(row: dict[str, object]) -> str:
    return f"{'>' if row['strict'] else '≥'} {row['required']:.3f}"


def _mplug() -> str:
    return str(Path(sys.executable).with_name("mplug"))


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ends on SIGTERM as on Ctrl-C: the contexts inside have closed, so that no process stays behind."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        console.print("\nstopped; the same command goes on where this one was")
        sys.exit(INTERRUPTED)
    finally:
        signal.signal(signal.SIGTERM, previous)
