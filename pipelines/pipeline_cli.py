"""The commands `mplug pipeline …`: run here, compile, submit. Each is a call into the package."""

from pathlib import Path
from typing import Annotated

import typer

pipeline = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown",
    help="Run a pipeline here, or on Kubeflow Pipelines: pretrain, finetune, benchmark, or all of it as mplug-video.",
)  # fmt: skip
Name = Annotated[str, typer.Argument(help="pretrain, finetune, benchmark or mplug-video.")]
Arguments = Annotated[
    list[str] | None, typer.Argument(help="parameter=value, values as YAML; `mplug pipeline parameters` lists them.")
]


@pipeline.command()
def parameters(name: Name) -> None:
    """List the parameters of a pipeline, with defaults.

    Example: `mplug pipeline parameters pretrain`
    """
    from rich.console import Console
    from rich.table import Table

    from pipelines.catalog import parameters

    table = Table(box=None)
    for column in ("parameter", "default", ""):
        table.add_column(column)
    for key, parameter in parameters(name).items():
        default = str(parameter.get("defaultValue", "")) if parameter.get("isOptional") else "required"
        table.add_row(key, default, parameter.get("description", ""))
    Console(highlight=False).print(table)


@pipeline.command()
def run(
    name: Name,
    items: Arguments = None,
    folder: Annotated[Path, typer.Option(help="Where kfp keeps step outputs and its cache.")] = Path("kfp"),
) -> None:
    """Run a pipeline on this machine; finished stages are not run again. Training runs here too, unless `nodes` says
    how many pods of the current cluster it takes.

    Example: `mplug pipeline run mplug-video source=corpus root=s3://mplug/work tracking_uri=http://127.0.0.1:5000`
    """
    from pipelines.catalog import arguments
    from pipelines.local import run

    run(name, folder, arguments(name, items or []))


@pipeline.command("compile")
def compile_all(
    folder: Annotated[Path, typer.Argument(help="Folder to write to.")] = Path("pipelines/compiled"),
) -> None:
    """Compile all pipelines, as they are sent to Kubeflow Pipelines or uploaded in its page.

    Example: `mplug pipeline compile pipelines/compiled`
    """
    from pipelines.catalog import PIPELINES, compile_to

    for name in PIPELINES:
        print(compile_to(name, folder))


@pipeline.command()
def submit(
    name: Name,
    items: Arguments = None,
    overlay: Annotated[
        Path | None, typer.Option(help="Folder below k8s/overlays whose defaults to take; without: the cluster's.")
    ] = None,
    host: Annotated[str, typer.Option(envvar="KFP_HOST", help="URL of Kubeflow Pipelines.")] = "http://localhost:8888",
    token: Annotated[str, typer.Option(envvar="KFP_TOKEN", help="Sent as a bearer token.")] = "",
    header: Annotated[
        list[str] | None, typer.Option(help="'name: value', sent with every request; repeatable.")
    ] = None,
    namespace: Annotated[str, typer.Option(help="Profile, in a Kubeflow that has them.")] = "",
    experiment: Annotated[str, typer.Option(help="Experiment in Kubeflow Pipelines.")] = "mplug-video",
    service_account: Annotated[str, typer.Option(help="Of the steps; without, the backend's default.")] = "",
    cache: Annotated[bool, typer.Option(help="Take finished steps from the cache.")] = True,
    wait: Annotated[bool, typer.Option(help="Wait for the end; exit code 0 says that the run has succeeded.")] = False,
) -> None:
    """Start a pipeline on Kubeflow Pipelines; prints the link to its run.

    What is not given are the defaults of the cluster: image, addresses, and what each step takes (ConfigMap
    mplug-pipelines).

    Example: `mplug pipeline submit pretrain image=… source=modelscope://… decoder=s3://… --wait`
    """
    from model.config import ConfigError
    from pipelines import submit as sending
    from pipelines.catalog import with_defaults
    from pipelines.cluster_defaults import arguments_on_cluster
    from pipelines.local import refuse

    given = arguments_on_cluster(name, items or [], overlay)
    values = with_defaults(name, given)
    refuse(values)
    pairs = [item.partition(":") for item in header or []]
    if wrong := [name for name, separator, _ in pairs if not separator]:
        raise ConfigError(f"--header must be 'name: value', got {wrong[0]!r}.")
    headers = {name.strip(): value.strip() for name, _, value in pairs}
    target = sending.Host(url=host, token=token, headers=headers, namespace=namespace)
    run_id = sending.submit(
        target, name, given, run_name=values["run_name"], experiment=experiment,
        service_account=service_account, caching=cache,
    )  # fmt: skip
    print(target.link(run_id), flush=True)
    if wait:
        sending.wait(target, run_id)
