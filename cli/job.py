"""The commands `mplug job …`, which run a command of `mplug` as a job on a cluster."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from components.jobs.manifests import Launch

job = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Run a command of `mplug` on a Kubernetes cluster: training as a PyTorchJob, others as a Job with one pod.",
)
# the arguments after the options are another command line with its own options
COMMAND_LINE = {"allow_interspersed_args": False}
Command = Annotated[
    list[str], typer.Argument(help="Command of mplug with its arguments: train, evaluate, data, convert.")
]
Name = Annotated[str, typer.Argument(help="Name of the job, as printed by `mplug job apply`.")]
Namespace = Annotated[str, typer.Option(help="Default: that of the overlay, or of the current context.")]
Overlay = Annotated[
    Path | None,
    typer.Option(help="Folder below k8s/overlays with the PodTemplate to use. Default: that of the cluster."),
]
Title = Annotated[str, typer.Option("--name", help="Default: derived from the command, the same for the same job.")]
Nodes = Annotated[int, typer.Option(min=1, help="Pods of a training job.")]
Processes = Annotated[int, typer.Option(min=0, help="Per node. 0: one per GPU of the PodTemplate, or one.")]
Image = Annotated[str, typer.Option(help="Default: that of the PodTemplate.")]
Deadline = Annotated[float, typer.Option(min=0, help="Deadline of the job in hours; 0: none.")]
Api = Literal["pytorchjob", "trainjob"]
ApiName = Annotated[Api, typer.Option("--api", help="pytorchjob of Training Operator 1, or trainjob of Trainer 2.")]


@job.command(context_settings=COMMAND_LINE)
def render(
    command: Command,
    overlay: Overlay = None,
    namespace: Namespace = "",
    name: Title = "",
    nodes: Nodes = 1,
    processes: Processes = 0,
    image: Image = "",
    deadline_hours: Deadline = 0,
    api: ApiName = "pytorchjob",
) -> None:
    """Print the manifest of a job, for `kubectl apply -f -` or a repository. Needs no cluster with --overlay.

    Example: `mplug job render --overlay k8s/overlays/production --nodes 8 train pretrain_1.3b data.shards=s3://…`
    """
    import yaml

    launch = _launch(command, name, nodes, processes, image, deadline_hours)
    _, manifests = _manifests(launch, overlay, namespace, api)
    print(yaml.safe_dump_all(manifests, sort_keys=False, allow_unicode=True, width=120), end="")


@job.command(context_settings=COMMAND_LINE)
def apply(
    command: Command,
    overlay: Overlay = None,
    namespace: Namespace = "",
    name: Title = "",
    nodes: Nodes = 1,
    processes: Processes = 0,
    image: Image = "",
    deadline_hours: Deadline = 0,
    api: ApiName = "pytorchjob",
) -> None:
    """Create a job and print its name. An existing job is kept, or replaced if it has failed.

    Example: `mplug job apply --nodes 8 train pretrain_1.3b data.shards=s3://… model.decoder=s3://…`
    """
    from components.jobs.client import Cluster
    from components.jobs.launcher import ensure_job

    launch = _launch(command, name, nodes, processes, image, deadline_hours)
    namespace, manifests = _manifests(launch, overlay, namespace, api)
    print(ensure_job(Cluster(namespace), manifests)["metadata"]["name"])


def _launch(command: list[str], name: str, nodes: int, processes: int, image: str, hours: float) -> "Launch":
    from components.jobs.manifests import Launch

    return Launch(
        command=tuple(command), name=name, nodes=nodes, processes=processes, image=image, deadline_s=int(hours * 3600)
    )


def _manifests(launch: "Launch", overlay: Path | None, namespace: str, api: Api) -> tuple[str, list[dict[str, object]]]:
    """The namespace of a job, and its manifests."""
    from components.jobs.client import Cluster
    from components.jobs.manifests import POD_TEMPLATE, load_pod_template, render_job

    if overlay:
        pod_template, known = load_pod_template(overlay)
    else:
        cluster = Cluster(namespace)
        pod_template, known = cluster.pod_template(POD_TEMPLATE), cluster.namespace
    return namespace or known, render_job(launch, pod_template, namespace or known, api)


@job.command()
def watch(name: Name, namespace: Namespace = "") -> None:
    """Follow a job to its end: its log, its restarts, and why its pods wait. Exits with 0 if it succeeds.

    Example: `mplug job watch pretrain-1-3b`
    """
    from components.jobs.client import Cluster
    from components.jobs.launcher import Limits, find_kind, follow_job

    cluster = Cluster(namespace)
    follow_job(cluster, find_kind(cluster, name), name, Limits(restarts=sys.maxsize))


@job.command()
def logs(
    name: Name,
    namespace: Namespace = "",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for new lines.")] = False,
) -> None:
    """Print the log of the first pod of a job.

    Example: `mplug job logs pretrain-1-3b --follow`
    """
    from components.jobs.client import Cluster
    from components.jobs.launcher import find_kind, follow_log
    from components.jobs.log import print_log

    cluster = Cluster(namespace)
    kind = find_kind(cluster, name)
    if follow:
        follow_log(cluster, kind, name)
    else:
        print_log(cluster, kind, name, {}, follow=False)


@job.command("cancel")
def cancel_job(name: Name, namespace: Namespace = "") -> None:
    """Remove a job. A training job saves a checkpoint first, and the same job resumes from it.

    Example: `mplug job cancel pretrain-1-3b`
    """
    from components.jobs.client import Cluster
    from components.jobs.launcher import find_kind

    cluster = Cluster(namespace)
    kind = find_kind(cluster, name)
    cluster.delete(kind, name)
    if kind == "TrainJob":
        cluster.delete("TrainingRuntime", name)
    print(f"{name} was removed")
