"""The commands `mplug pipeline …`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipelines.kfp_host import Host

pipeline = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Run a pipeline on this machine or on Kubeflow Pipelines: pretrain, finetune, benchmark, or mplug-video.",
)
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

    from pipelines.catalog import pipeline_parameters

    table = Table(box=None)
    for column in ("parameter", "default", ""):
        table.add_column(column)
    for key, parameter in pipeline_parameters(name).items():
        default = str(parameter.get("defaultValue", "")) if parameter.get("isOptional") else "required"
        table.add_row(key, default, parameter.get("description", ""))
    Console(highlight=False).print(table)


@pipeline.command()
def run(
    name: Name,
    items: Arguments = None,
    folder: Annotated[Path, typer.Option(help="Where kfp keeps step outputs and its cache.")] = Path("kfp"),
) -> None:
    """Run a pipeline on this machine. Finished stages are not repeated. With `nodes` above 0, training runs as a job on
    the current cluster.

    Example: `mplug pipeline run mplug-video source=corpus root=s3://mplug/work tracking_uri=http://127.0.0.1:5000`
    """
    from pipelines.catalog import parse_arguments
    from pipelines.local import run_pipeline

    run_pipeline(name, folder, parse_arguments(name, items or []))


@pipeline.command("compile")
def compile_all(
    folder: Annotated[Path, typer.Argument(help="Folder to write to.")] = Path("pipelines/compiled"),
) -> None:
    """Compile all pipelines for Kubeflow Pipelines.

    Example: `mplug pipeline compile pipelines/compiled`
    """
    from pipelines.catalog import PIPELINES, compile_to

    for name in PIPELINES:
        print(compile_to(name, folder))


Url = Annotated[str, typer.Option("--host", envvar="KFP_HOST", help="URL of Kubeflow Pipelines.")]
Token = Annotated[str, typer.Option(envvar="KFP_TOKEN", help="Sent as a bearer token.")]
Headers = Annotated[
    list[str] | None, typer.Option("--header", help="'name: value', added to every request; repeatable.")
]
Profile = Annotated[str, typer.Option("--namespace", help="Profile namespace, for a Kubeflow with profiles.")]
Wait = Annotated[
    bool,
    typer.Option(
        help="Wait for the end, and show current steps, why they wait, and failures. Exits with 0 if the run succeeds."
    ),
]
Retries = Annotated[int, typer.Option(min=0, help="While waiting, retry transient failures this many times.")]
LOCAL = "http://localhost:8888"


@pipeline.command()
def submit(
    name: Name,
    items: Arguments = None,
    overlay: Annotated[
        Path | None,
        typer.Option(help="Folder below k8s/overlays with the defaults to use. Default: those of the cluster."),
    ] = None,
    url: Url = LOCAL,
    token: Token = "",
    headers: Headers = None,
    profile: Profile = "",
    experiment: Annotated[str, typer.Option(help="Experiment in Kubeflow Pipelines.")] = "mplug-video",
    service_account: Annotated[
        str, typer.Option(help="Service account of the steps. Default: that of the backend.")
    ] = "",
    cache: Annotated[bool, typer.Option(help="Take finished steps from the cache.")] = True,
    wait: Wait = False,
    retries: Retries = 0,
) -> None:
    """Start a pipeline on Kubeflow Pipelines and print the link to its run.

    Parameters that are not given have the defaults of the cluster: image, addresses, and resources of each step
    (ConfigMap mplug-pipelines).

    Example: `mplug pipeline submit pretrain source=modelscope://… decoder=s3://… --wait --retries 3`
    """
    from pipelines.catalog import with_defaults
    from pipelines.cluster_defaults import arguments_on_cluster
    from pipelines.follow_run import follow_run
    from pipelines.local import validate_arguments
    from pipelines.submit import submit_run

    given = arguments_on_cluster(name, items or [], overlay)
    values = with_defaults(name, given)
    validate_arguments(values)
    host = _host(url, token, headers, profile)
    run_id = submit_run(
        host,
        name,
        given,
        run_name=values["run_name"],
        experiment=experiment,
        service_account=service_account,
        caching=cache,
    )
    print(host.link(run_id), flush=True)
    if wait or retries:
        follow_run(host, run_id, retries)


@pipeline.command()
def retry(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="ID of a run, which is the end of its link.")],
    url: Url = LOCAL,
    token: Token = "",
    headers: Headers = None,
    profile: Profile = "",
    wait: Wait = False,
    retries: Retries = 0,
) -> None:
    """Retry the failed steps of a run. Succeeded steps are kept; a training job resumes from its checkpoint.

    Example: `mplug pipeline retry 0c2f5c8e-… --wait`
    """
    from pipelines.follow_run import follow_run, retry_run

    host = _host(url, token, headers, profile)
    retry_run(host, run_id)
    print(host.link(run_id), flush=True)
    if wait or retries:
        follow_run(host, run_id, retries)


@pipeline.command("cancel")
def cancel_run(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="ID of a run, which is the end of its link.")],
    url: Url = LOCAL,
    token: Token = "",
    headers: Headers = None,
    profile: Profile = "",
) -> None:
    """Cancel a run, and wait until its training jobs have saved a checkpoint.

    Example: `mplug pipeline cancel 0c2f5c8e-…`
    """
    from pipelines.follow_run import cancel_run

    cancel_run(_host(url, token, headers, profile), run_id)
    print(f"{run_id} was cancelled")


def _host(url: str, token: str, headers: list[str] | None, profile: str) -> "Host":
    from model.errors import ConfigError
    from pipelines.kfp_host import Host

    pairs = [item.partition(":") for item in headers or []]
    if wrong := [name for name, separator, _ in pairs if not separator]:
        raise ConfigError(f"--header must be 'name: value', got {wrong[0]!r}.")
    sent = {name.strip(): value.strip() for name, _, value in pairs}
    return Host(url=url, token=token, headers=sent, namespace=profile)
