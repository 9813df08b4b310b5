"""`mplug demo`: runs the whole platform on one machine, from synthetic clips to registered models."""

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
from typing import Any

from rich.console import Console
from rich.table import Table

from cli.services import BUCKET, LocalServices, run_services, stop_process
from model import storage
from model.data.synthetic.corpus import synthesize_corpus
from model.errors import INTERRUPTED, ConfigError, ProcessFailedError, StageError
from pipelines.local import validate_arguments

ROOT = f"s3://{BUCKET}/demo"
RUN_NAME = "demo"
STAGE = re.compile(r"Task '([a-z-]+?)(-[0-9]+)?' finished with status (SUCCESS|FAILURE)")
PROGRESS = re.compile(r"[0-9]%\|.*(clip|file|step|batch)")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
console = Console(highlight=False)


def run_demo(folder: Path, *, scale: float, overrides: list[str]) -> int:
    """Runs the demo in `folder`. Returns 0, or 1 if a result is below its requirement."""
    validate_arguments({"root": ROOT, "overrides": overrides})
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MPLUG_CACHE", str(folder / "cache"))
    started = time.monotonic()
    with _interruptible():
        source = _corpus(folder, scale)
        console.print("[bold]starting S3 and MLflow[/]")
        with run_services(folder) as services:
            _run_pipeline(folder, source, services, overrides)
            report, results = _fetch_report(folder, services)
    missed = _print_results(results)
    minutes = (time.monotonic() - started) / 60
    console.print(f"\nreport   {report}\nMLflow   [bold]{_mplug()} ui {folder}[/]\ntook     {minutes:.1f} minutes")
    for row in missed:
        console.print(f"[red]missed:[/] {row['task']} {row['metric']} is {row['value']:.3f}, required {_bound(row)}")
    return 1 if missed else 0


def serve_demo(folder: Path) -> None:
    """Runs S3 and MLflow with the results of a demo until Ctrl-C."""
    if not (folder / "mlflow.db").exists():
        raise StageError(f"{folder} holds no demo. Run `mplug demo {folder}` first.")
    with _interruptible(), run_services(folder) as services:
        console.print(f"MLflow   [bold]{services.tracking_uri}[/]   (Ctrl-C stops it)")
        signal.pause()


def _corpus(folder: Path, scale: float) -> Path:
    """The synthetic dataset, which is generated once and becomes visible when it is complete."""
    source, partial, note = folder / "source", folder / "source.partial", folder / "scale"
    if source.exists() and note.read_text(encoding="utf-8") != str(scale):
        raise ConfigError(f"--scale must be {note.read_text()} for {folder}, got {scale}. Name another folder.")
    if not source.exists():
        shutil.rmtree(partial, ignore_errors=True)
        synthesize_corpus(partial, scale=scale)
        note.write_text(str(scale), encoding="utf-8")
        partial.rename(source)
    return source


def _run_pipeline(folder: Path, source: Path, services: LocalServices, overrides: list[str]) -> None:
    log = folder / "pipeline.log"
    command = [
        _mplug(), "pipeline", "run", "--folder", str(folder / "kfp"), "mplug-video", f"source={source}", f"root={ROOT}",
        f"tracking_uri={services.tracking_uri}", f"run_name={RUN_NAME}", f"overrides={json.dumps(overrides)}",
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
        if code := child.wait():
            message = f"the pipeline failed; see {log}. Run `mplug demo` again to resume."
            raise ProcessFailedError(message, code)
    finally:
        stop_process(child)


def _show(line: str) -> None:
    """Shows the progress of the pipeline. Its whole output is in pipeline.log."""
    line = COLOUR.sub("", line).strip()
    if stage := STAGE.search(line):
        if not line.startswith("Task"):  # kfp prints every line twice, once with a timestamp
            mark = "[green]✓[/]" if stage[3] == "SUCCESS" else "[red]✗[/]"
            console.print(f"{mark} {stage[1]}")
    elif PROGRESS.search(line) or line.startswith("error: "):
        print(f"  {line}", flush=True)


def _fetch_report(folder: Path, services: LocalServices) -> tuple[Path, list[dict[str, Any]]]:
    """Copies the report of this run out of S3, which is stopped with the demo."""
    uri = storage.join(ROOT, "reports", RUN_NAME)
    storage.download_file(storage.join(uri, "report.html"), folder / "report.html")
    return folder / "report.html", json.loads(storage.read(storage.join(uri, "results.json")))


def _print_results(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Prints the table and returns the rows that were missed."""
    table = Table(title="results on the test splits; baseline: without pre-training, or untuned", title_justify="left")
    for column in ("task", "metric"):
        table.add_column(column)
    for column in ("value", "baseline", "chance", "required"):
        table.add_column(column, justify="right")
    for row in results:
        chance = "–" if row["chance"] is None else f"{row['chance']:.3f}"
        value = f"[{'green' if row['passed'] else 'red'}]{row['value']:.3f}[/]"
        table.add_row(str(row["task"]), str(row["metric"]), value, f"{row['baseline']:.3f}", chance, _bound(row))
    console.print(table)
    return [row for row in results if not row["passed"]]


def _bound(row: dict[str, Any]) -> str:
    return f"{'>' if row['strict'] else '≥'} {row['required']:.3f}"


def _mplug() -> str:
    return str(Path(sys.executable).with_name("mplug"))


@contextmanager
def _interruptible() -> Iterator[None]:
    """Handles SIGTERM and a closed terminal like Ctrl-C, so that contexts close and no process stays behind."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    except KeyboardInterrupt:
        console.print("\nstopped; run the same command to resume")
        sys.exit(INTERRUPTED)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
