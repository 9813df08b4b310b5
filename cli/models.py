"""The commands `mplug models …`: registered models, their comparison, promotion and reproduction."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from model.evaluation.results import Evaluation
    from model.registry import Version

models = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Registered models in MLflow: list, compare, promote, roll back, reproduce.",
)
Uri = Annotated[str, typer.Option("--tracking-uri", envvar="MLFLOW_TRACKING_URI", help="MLflow server.")]
Reference = Annotated[str, typer.Argument(metavar="MODEL", help="name/3, name@champion, or a name: newest version.")]
RUN_ID = re.compile("[0-9a-f]{32}")
Tolerance = Annotated[float, typer.Option(min=0, help="Allowed distance below the champion.")]


@models.command("list")
def list_models(uri: Uri = "") -> None:
    """List registered models: versions, aliases, data and headline metric.

    Example: `mplug models list --tracking-uri http://127.0.0.1:5000`
    """
    from model import registry

    rows = []
    for name in registry.list_names(_server(uri)):
        for each in registry.list_versions(uri, name):
            data = each.tags.get("data", "")
            rows.append([f"{each.name}/{each.number}", ", ".join(each.aliases), data, _headline(each)])
    print_table(["version", "aliases", "evaluated on", "headline metric"], rows)


@models.command()
def show(reference: Reference, uri: Uri = "") -> None:
    """Show where a version comes from, its metrics with intervals, and how its model's champion changed.

    Example: `mplug models show mplug-video-retrieval@champion`
    """
    from model import registry
    from model.evaluation.promotion import read_history

    version = registry.find_version(_server(uri), reference)
    facts = {
        "version": f"{version.name}/{version.number}",
        "aliases": ", ".join(version.aliases),
        "model": version.source,
        "MLflow run": version.run_id,
        "registered": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(version.created_ms / 1000)),
        **{key: value for key, value in sorted(version.tags.items()) if key != "config"},
    }
    print_table(["", ""], [[key, value] for key, value in facts.items() if value])
    history = [
        [str(each.number), each.time, each.action, f"{each.before or '–'} → {each.to}", each.by, each.difference]
        for each in read_history(version)
    ]
    if history:
        print_table(["change", "time", "", "champion", "by", "headline metric"], history)


@models.command()
def compare(
    first: Annotated[str, typer.Argument(help="Version, as in `mplug models show`, or folder of an evaluation.")],
    second: Annotated[str, typer.Argument(help="The same.")],
    uri: Uri = "",
) -> None:
    """Compare two models on the same predictions, with intervals of the differences.

    Both must have been evaluated by the same protocol on the same data.

    Example: `mplug models compare mplug-video-retrieval@candidate mplug-video-retrieval@champion`
    """
    from model.evaluation.comparison import compare_evaluations

    (ours,), (theirs,) = (find_evaluations(reference, uri) for reference in (first, second))
    rows = [
        [
            each.metric,
            f"{each.ours:.4f}",
            f"{each.theirs:.4f}",
            f"{each.ours - each.theirs:+.4f}",
            f"{each.low:+.4f} to {each.high:+.4f}",
        ]
        for each in compare_evaluations(ours, theirs)
    ]
    print(ours.protocol_line, file=sys.stderr)
    print_table(["metric", first, second, "difference", "95 % of resampled splits"], rows)


@models.command()
def promote(reference: Reference, uri: Uri = "", tolerance: Tolerance = 0.0) -> None:
    """Make a version the champion, if it passes the gate.

    It must not be below the champion by more than the tolerance in 97.5 % of resampled splits.

    Example: `mplug models promote mplug-video-retrieval@candidate --tolerance 0.01`
    """
    from model import registry
    from model.evaluation.promotion import promote as promote_version

    record = promote_version(_server(uri), registry.find_version(uri, reference), tolerance)
    print(f"{record.name}: champion {record.before or 'none'} -> {record.to}; {record.difference}")


@models.command()
def rollback(name: Annotated[str, typer.Argument(help="Name of a registered model.")], uri: Uri = "") -> None:
    """Make the version before the champion the champion again.

    Example: `mplug models rollback mplug-video-retrieval`
    """
    from model.evaluation.promotion import rollback as roll_back

    record = roll_back(_server(uri), name)
    print(f"{record.name}: champion {record.before} -> {record.to}")


@models.command()
def reproduce(
    reference: Reference,
    uri: Uri = "",
    folder: Annotated[Path, typer.Option(help="Where to write the configuration.")] = Path(),
    run: Annotated[bool, typer.Option(help="Also run the command, and compare the weights.")] = False,
) -> None:
    """Write the configuration of a version, and print the command that trains it again.

    Example: `mplug models reproduce mplug-video-retrieval@champion --run`
    """
    from model import manifest, registry
    from model.errors import ConfigError, ProcessFailedError
    from pipelines.local import code_version

    version = registry.find_version(_server(uri), reference)
    facts = manifest.read_manifest(version.source)
    if "config" not in facts:
        raise ConfigError(f"{version.source} was not trained here: it has no configuration.")
    config = facts["config"] | {"trial": facts["config"]["trial"] + 1}  # else the finished run would only be reported
    path = folder / f"{version.name}-{version.number}.yaml"
    path.write_text(json.dumps(config, ensure_ascii=False, indent=1), encoding="utf-8")
    trained_with = config["code_version"]
    if trained_with and trained_with != code_version():
        print(f"warning: trained with code version {trained_with}, this is {code_version()}", file=sys.stderr)
    command = ["mplug", "train", str(path)]
    print(*command)
    if not run:
        return
    ended = subprocess.run(
        [str(Path(sys.executable).with_name("mplug")), *command[1:]], stdout=subprocess.PIPE, text=True
    )
    if ended.returncode:
        raise ProcessFailedError(f"the training ended with exit code {ended.returncode}; see above.", ended.returncode)
    again = ended.stdout.split()[-1]
    same = _weights(facts) == _weights(manifest.read_manifest(again))
    print(f"{again} has {'the same weights as' if same else 'other weights than'} {version.source}")


def _weights(facts: dict[str, dict[str, dict[str, str]]]) -> dict[str, str]:
    return {name: file["sha256"] for name, file in facts["files"].items() if name.endswith(".safetensors")}


def _server(uri: str) -> str:
    from model.errors import ConfigError

    if not uri:
        raise ConfigError("--tracking-uri or MLFLOW_TRACKING_URI must name the MLflow server.")
    return uri


def _headline(version: "Version") -> str:
    """The headline metric of a version, with its interval; empty if it was registered without."""
    name = version.tags.get("headline", "")
    return f"{name} {version.tags[name]} ({version.tags[name + '.interval']})" if name else ""


def find_evaluations(reference: str, uri: str) -> "list[Evaluation]":
    """The evaluation in a folder, that of a registered version, or all those of an MLflow run."""
    from model import registry, storage
    from model.evaluation.gate import evaluation_of
    from model.evaluation.results import EVALUATION, SCORES, load_evaluation

    if storage.exists(storage.join(reference, SCORES)):
        return [load_evaluation(reference)]
    if RUN_ID.fullmatch(reference):
        return [load_evaluation(found) for found in registry.tagged_runs(_server(uri), reference, EVALUATION)]
    return [load_evaluation(evaluation_of(registry.find_version(_server(uri), reference)))]


def find_model(reference: str, uri: str) -> "tuple[str, list[Evaluation]]":
    """URI of a model that is a folder, a URI or a registered version, and the evaluation of a version."""
    from model import registry, storage
    from model.errors import ConfigError
    from model.evaluation.gate import evaluation_of
    from model.evaluation.results import load_evaluation

    if storage.is_s3(reference) or Path(reference).exists():
        return reference, []
    if not uri:
        raise ConfigError(f"{reference} does not exist. A registered version needs --tracking-uri.")
    version = registry.find_version(uri, reference)
    return version.source, [load_evaluation(evaluation_of(version))]


def print_table(columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None)
    for column in columns:
        table.add_column(Text(column), overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console(highlight=False).print(table)
