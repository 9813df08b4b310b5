"""`mplug sweep`: searches the settings of a training."""

import sys
from typing import Annotated

import typer


def sweep(
    config: Annotated[str, typer.Argument(help="Preset (`mplug presets` lists them) or a .yaml file.")],
    settings: Annotated[
        list[str] | None, typer.Argument(help="key=1e-5..1e-3:log or key=8,16,32 is searched, key=value is fixed.")
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Trials in all, with those of earlier starts.")] = 20,
    parallel: Annotated[int, typer.Option(min=1, help="Trials at the same time.")] = 1,
    prune: Annotated[bool, typer.Option(help="Stop trials that are worse than the median at the same step.")] = True,
    name: Annotated[
        str, typer.Option(help="Name of the sweep in MLflow. Default: name of the preset and -sweep.")
    ] = "",
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes of a trial per machine. Default: one per GPU, or one.")
    ] = None,
    nodes: Annotated[int, typer.Option(min=0, help="Pods of each trial, as a PyTorchJob. 0: on this machine.")] = 0,
    image: Annotated[str, typer.Option(help="With --nodes. Default: that of the PodTemplate.")] = "",
    namespace: Annotated[str, typer.Option(help="With --nodes. Default: that of the current context.")] = "",
    deadline_hours: Annotated[float, typer.Option(min=0, help="With --nodes: deadline of a trial; 0: none.")] = 0,
) -> None:
    """Search for the settings of a training that reach the best `evaluation.metric`, with Optuna.

    The sweep is a run in MLflow with its trials below it. Trials train on this machine, or as jobs on the cluster of
    the current context. After an interruption the same command continues. Needs `tracking.uri` and `evaluation.every`.

    Example: `mplug sweep retrieval optim.lr=1e-5..1e-3:log data.batch_size=64,128 evaluation.every=200 --trials 30 …`
    """
    from cli.models import print_table
    from pipelines.sweep import Machines, Sweep, run_sweep

    machines = Machines(
        parallel=parallel,
        processes=processes,
        nodes=nodes,
        image=image,
        namespace=namespace,
        deadline_hours=deadline_hours,
    )
    found = run_sweep(
        Sweep(config=config, settings=settings or [], name=name, trials=trials, prunes=prune, machines=machines)
    )
    rows = [[str(each.number), f"{each.value:.4f}", *map(str, each.params.values()), each.model] for each in found]
    print_table(["trial", "value", *found[0].params, "model"], rows)
    print("best:", *(f"{key}={value}" for key, value in found[0].params.items()), file=sys.stderr)
