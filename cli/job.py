"""The commands `mplug job …`: a command of `mplug` as a job on a cluster. Each is a call into components/."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from components.jobs.manifests import Launch

job = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown",
    help="Run a command of `mplug` on a Kubernetes cluster: training as a PyTorchJob, all else as a Job of one pod.",
)  # fmt: skip
# what follows the options is another command line, with options of its own
COMMAND_LINE = {"allow_interspersed_args": False}
Command = Annotated[
    list[str], typer.Argument(help="As on a laptop: train, evaluate, data, convert, with what follows.")
]
Name = Annotated[str, typer.Argument(help="The job's name, as `mplug job apply` printed it.")]
Namespace = Annotated[str, typer.Option(help="Without: the overlay's, or that of the current context.")]
Overlay = Annotated[
    Path | None, typer.Option(help="Folder below k8s/overlays whose shape of a pod to take; without: the cluster's.")
]
Title = Annotated[str, typer.Option("--name", help="Without: made of the command, the same for the same job.")]
Nodes = Annotated[int, typer.Option(min=1, help="Pods of a training job.")]
Processes = Annotated[int, typer.Option(min=0, help="Per node. 0: as many as the shape has GPUs, or one.")]
Image = Annotated[str, typer.Option(help="Without: the shape's.")]
Deadline = Annotated[float, typer.Option(min=0, help="Hours after which the operator ends the job; 0: none.")]
Api = Literal["pytorchjob", "trainjob"]
ApiName = Annotated[Api, typer.Option("--api", help="Of Training Operator 1, or Trainer 2.")]


@job.command(context_settings=COMMAND_LINE)
def render(
    command: Command, overlay: Overlay = None, namespace: Namespace = "", name: Title = "", nodes: Nodes = 1,
    processes: Processes = 0, image: Image = "", deadline_hours: Deadline = 0, api: ApiName = "pytorchjob",
) -> None:  # fmt: skip
    """Print a job's manifest, for `kubectl apply -f -` or a repository. With --overlay it needs no cluster.

    Example: `mplug job render --overlay k8s/overlays/production --nodes 8 train pretrain_1.3b data.shards=s3://…`
    """
    import yaml

    launch = _launch(command, name, nodes, processes, image, deadline_hours)
    _, manifests = _manifests(launch, overlay, namespace, api)
    print(yaml.safe_dump_all(manifests, sort_keys=False, allow_unicode=True, width=120), end="")


@job.command(context_settings=COMMAND_LINE)
def apply(
    command: Command, overlay: Overlay = None, namespace: Namespace = "", name: Title = "", nodes: Nodes = 1,
    processes: Processes = 0, image: Image = "", deadline_hours: Deadline = 0, api: ApiName = "pytorchjob",
) -> None:  # fmt: skip
    """Create a job; prints its name. One that is there already and has not failed stays, one that has is replaced.

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
    from components.jobs.manifests import SHAPE, load_pod_template, render_job

    if overlay:
        shape, known = load_pod_template(overlay)
    else:
        cluster = Cluster(namespace)
        shape, known = cluster.pod_template(SHAPE), cluster.namespace
    return namespace or known, render_job(launch, shape, namespace or known, api)


@job.command()
def watch(name: Name, namespace: Namespace = "") -> None:
    """Follow a job to its end: its log, its restarts, and why its pods wait. Exit code 0 says that it has succeeded.

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
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for what is still to come.")] = False,
) -> None:
    """Print the log of a job's first pod.

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


@job.command()
def cancel(name: Name, namespace: Namespace = "") -> None:
    """Remove a job. A run saves a checkpoint first, and the same job goes on from it.

    Example: `mplug job cancel pretrain-1-3b`
    """
    from components.jobs.client import Cluster
    from components.jobs.launcher import find_kind

    cluster = Cluster(namespace)
    kind = find_kind(cluster, name)
    cluster.delete(kind, name)
    if kind == "TrainJob":
        cluster.delete("TrainingRuntime", name)
    print(f"{name} is removed")
