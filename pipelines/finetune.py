"""From a pre-trained model to a registered one for a task: shards -> fine-tuning -> evaluation -> gate -> registry."""

from typing import Any

from kfp import dsl

from components.evaluate import evaluate
from components.finish_run import finish_run
from components.gate import gate
from components.register import register
from components.shard import shard
from components.start_run import start_run
from components.train import train
from pipelines.placement import SIZES, place, set_nodes, set_resources


@dsl.pipeline(name="mplug-video-finetune-tasks")
def finetune_tasks(
    configs: list[str], shards: dict[str, str], pretrained: str, decoder: str, root: str, overrides: list[str],
    nodes: int, processes: int, namespace: str, deadline_hours: float, minimum: dict[str, float], tolerance: float,
    promote: bool, train_cpu: str, train_memory: str, evaluate_cpu: str, evaluate_memory: str, gpus: int,
    node_selector: dict[str, str], tolerations: list[dict[str, str]], tracking: dict[str, str], code_version: str,
    image: str, cpu_image: str,
) -> None:  # fmt: skip
    """Every task beside the others, then all of them before the gate.

    A pipeline of its own: kfp 2.17's local runner hands a loop its item in place of every output of a sibling task,
    but leaves the inputs of the pipeline around it alone.
    """
    common = {"tracking": tracking, "code_version": code_version}
    with dsl.ParallelFor(configs, name="tasks") as config:
        tuned = train(
            config=config, shards=shards, root=root, decoder=decoder, pretrained=pretrained,
            init="pretrained", nodes=nodes, processes=processes, image=image, namespace=namespace,
            deadline_hours=deadline_hours, overrides=overrides, **common,
        )  # fmt: skip
        set_resources(place(tuned, cpu_image), cpu=train_cpu, memory=train_memory)
        judged = evaluate(trained=tuned.output, config=config, shards=shards, **common)
        set_resources(place(judged, image), cpu=evaluate_cpu, memory=evaluate_memory, gpus=gpus)
        set_nodes(judged, node_selector, tolerations)
    # one Collected per consumer: the compiler rewrites it in place
    passed = gate(
        evaluations=dsl.Collected(judged.outputs["Output"]), root=root, minimum=minimum, tolerance=tolerance, **common
    )  # fmt: skip
    place(passed, cpu_image).set_caching_options(False)  # who is champion changes
    place(register(evaluations=passed.output, promote=promote, **common), cpu_image)


@dsl.pipeline(name="mplug-video-finetune-stages")
def finetune_stages(
    raw: str, raw_version: str, root: str, configs: list[str], num_frames: int, short_side: int,
    pretrained: str, decoder: str, overrides: list[str], nodes: int, processes: int, namespace: str,
    deadline_hours: float, minimum: dict[str, float], tolerance: float, promote: bool, shard_cpu: str,
    shard_memory: str, train_cpu: str, train_memory: str, evaluate_cpu: str, evaluate_memory: str, gpus: int,
    node_selector: dict[str, str], tolerations: list[dict[str, str]], tracking_uri: str, experiment: str, run_name: str,
    code_version: str, image: str, cpu_image: str,
) -> None:  # fmt: skip
    """The stages, each under the pipeline's MLflow run."""
    opened = start_run(
        tracking_uri=tracking_uri, experiment=experiment, run_name=run_name, source=pretrained, root=root
    )  # fmt: skip
    place(opened, cpu_image).set_caching_options(False)
    common = {"tracking": opened.output, "code_version": code_version}
    sharded = shard(
        raw=raw, raw_version=raw_version, root=root, datasets=configs, num_frames=num_frames, short_side=short_side,
        partition="1/1", **common,
    )  # fmt: skip
    set_resources(place(sharded, cpu_image), cpu=shard_cpu, memory=shard_memory)
    finetune_tasks(
        configs=configs, shards=sharded.output, pretrained=pretrained, decoder=decoder, root=root, overrides=overrides,
        nodes=nodes, processes=processes, namespace=namespace, deadline_hours=deadline_hours, minimum=minimum,
        tolerance=tolerance, promote=promote, train_cpu=train_cpu, train_memory=train_memory, evaluate_cpu=evaluate_cpu,
        evaluate_memory=evaluate_memory, gpus=gpus, node_selector=node_selector, tolerations=tolerations, image=image,
        cpu_image=cpu_image, **common,
    )  # fmt: skip


def tasks_pipeline(name: str, description: str, presets: list[str]) -> Any:
    """The pipeline for these tasks, where a run names no others."""

    @dsl.pipeline(name=f"mplug-video-{name}", description=description)
    def pipeline(
        raw: str,
        pretrained: str,
        code_version: str,
        image: str,
        cpu_image: str,
        raw_version: str = "",
        root: str = "s3://mplug/work",
        configs: list[str] = presets,
        decoder: str = "",
        num_frames: int = 16,
        short_side: int = 256,
        overrides: list[str] = [],  # noqa: B006 - kfp reads the default from the signature
        nodes: int = 1,
        processes: int = 0,
        namespace: str = "mplug",
        deadline_hours: float = 0.0,
        minimum: dict[str, float] = {},  # noqa: B006
        tolerance: float = 0.0,
        promote: bool = False,
        shard_cpu: str = SIZES["shard_cpu"],
        shard_memory: str = SIZES["shard_memory"],
        train_cpu: str = SIZES["train_cpu"],
        train_memory: str = SIZES["train_memory"],
        evaluate_cpu: str = SIZES["evaluate_cpu"],
        evaluate_memory: str = SIZES["evaluate_memory"],
        gpus: int = 1,
        node_selector: dict[str, str] = {},  # noqa: B006
        tolerations: list[dict[str, str]] = [],  # noqa: B006
        tracking_uri: str = "http://mlflow.mplug.svc:5000",
        experiment: str = "mplug-video",
        run_name: str = name,
    ) -> None:
        """The stages, and a last word to MLflow however they end.

        Args:
            raw: Folder or URI of the downloaded dataset, <root>/raw/<name>.
            pretrained: Folder or URI of the model to start from.
            image: Image of the training pods and of the evaluations.
            cpu_image: Image of the other steps: the same, or the smaller one without CUDA.
            raw_version: Names the state of the dataset; a new one decodes it again.
            code_version: Names the code; a new one runs every stage again.
            root: s3:// URI under which everything is written.
            configs: Presets, one for each task.
            decoder: Folder or URI of another language model; empty is the pre-trained model's own.
            num_frames: Frames stored per clip.
            short_side: Height or width of stored frames, whichever is shorter, in pixels.
            overrides: dotted.key=value settings of the training.
            nodes: Pods of each training job; 0 trains in the step itself.
            processes: Training processes per node; 0 is one per GPU of the cluster's shape of a pod.
            namespace: Where the training job runs.
            deadline_hours: Hours after which the training job is given up; 0 is never.
            minimum: What a task's metric must reach, as {"classification": 0.75}.
            tolerance: How far below the champion's value it may stay.
            promote: Make champions of the models in the registry when all have passed.
            shard_cpu: Cores of the step that decodes, as Kubernetes writes them.
            shard_memory: Memory of the step that decodes.
            train_cpu: Cores of the step that follows a training job, or that trains itself with 0 nodes.
            train_memory: Memory of that step.
            evaluate_cpu: Cores of each evaluation.
            evaluate_memory: Memory of each evaluation.
            gpus: GPUs of each evaluation.
            node_selector: Labels of the nodes that have them.
            tolerations: Of those nodes' taints, as in a pod.
            tracking_uri: MLflow tracking server.
            experiment: MLflow experiment.
            run_name: Names the pipeline's MLflow run; a repeated run with the same name continues it.
        """
        last = finish_run(
            tracking_uri=tracking_uri,
            experiment=experiment,
            run_name=run_name,
            last_stages="gate register",
            namespace=namespace,
        )
        place(last, cpu_image).set_caching_options(False)
        with dsl.ExitHandler(last, name="stages"):
            finetune_stages(
                raw=raw, raw_version=raw_version, root=root, configs=configs, num_frames=num_frames,
                short_side=short_side, pretrained=pretrained, decoder=decoder, overrides=overrides, nodes=nodes,
                processes=processes, namespace=namespace, deadline_hours=deadline_hours, minimum=minimum,
                tolerance=tolerance, promote=promote, shard_cpu=shard_cpu, shard_memory=shard_memory,
                train_cpu=train_cpu, train_memory=train_memory, evaluate_cpu=evaluate_cpu,
                evaluate_memory=evaluate_memory, gpus=gpus, node_selector=node_selector, tolerations=tolerations,
                tracking_uri=tracking_uri, experiment=experiment, run_name=run_name, code_version=code_version,
                image=image, cpu_image=cpu_image,
            )  # fmt: skip

    return pipeline


finetune = tasks_pipeline("finetune", "Fine-tunes and judges a pre-trained mPLUG-Video on a task.", ["classification"])
