"""From a pre-trained model to a registered one for a task: shards -> fine-tuning -> evaluation -> gate -> registry."""

from typing import Any

from kfp import dsl

from components.evaluate import evaluate
from components.gate import gate
from components.register import register
from components.shard import shard
from components.train import train
from pipelines.placement import place, set_nodes, set_resources
from pipelines.tracked import JobParameters, call_step, inner_pipeline, returned, tracked_pipeline


class FinetuneParameters(JobParameters):
    raw: str
    """Folder or URI of the downloaded dataset, <root>/raw/<name>."""
    pretrained: str
    """Folder or URI of the model to start from."""
    raw_version: str = ""
    """Version of the dataset; a new one decodes it again."""
    configs: list[str]
    """Presets, one for each task."""
    decoder: str = ""
    """Folder or URI of another language model; empty: that of the pre-trained model."""
    split: str = "val"
    """Split that the models are evaluated on."""
    minimum: dict[str, float] = {}
    """Minimum score by task, such as {"classification": 0.75}."""
    tolerance: float = 0.0
    """Allowed distance below the score of the champion."""
    promote: bool = False
    """Promote the models to champions if all of them pass the gate."""
    evaluate_cpu: str = "8"
    """CPU of each evaluation, as a Kubernetes quantity; its number of threads follows from it."""
    evaluate_memory: str = "48Gi"
    """Memory of each evaluation."""
    gpus: int = 1
    """GPUs of each evaluation."""
    node_selector: dict[str, str] = {}
    """Labels of the nodes for evaluations."""
    tolerations: list[dict[str, str]] = []
    """Tolerations of evaluations, as in a pod."""


@inner_pipeline("finetune-tasks")
def finetune_tasks(p: FinetuneParameters, shards: dict[str, str], tracking: dict[str, str]) -> None:
    """Trains and evaluates all tasks in parallel, then passes them through the gate together."""
    given = {"shards": shards, "tracking": tracking}
    with dsl.ParallelFor(p.configs, name="tasks") as config:
        tuned = call_step(train, p, config=config, tokenizers={}, init="pretrained", **given)
        set_resources(place(tuned, p.cpu_image), cpu=p.train_cpu, memory=p.train_memory)
        judged = call_step(
            evaluate, p, trained=returned(tuned), config=config, baseline="", cpu=p.evaluate_cpu, **given
        )
        set_resources(place(judged, p.image), cpu=p.evaluate_cpu, memory=p.evaluate_memory, gpus=p.gpus)
        set_nodes(judged, p.node_selector, p.tolerations)
    passed = call_step(gate, p, evaluations=dsl.Collected(returned(judged)), tracking=tracking)
    place(passed, p.cpu_image).set_caching_options(False)  # the champion changes
    place(call_step(register, p, evaluations=passed.output, tracking=tracking), p.cpu_image)


def tune(p: FinetuneParameters, tracking: Any) -> None:
    """The stages of the pipelines `finetune` and `benchmark`, which have different tasks."""
    shards = call_step(shard, p, datasets=p.configs, partition="1/1", tracking=tracking)
    set_resources(place(shards, p.cpu_image), cpu=p.shard_cpu, memory=p.shard_memory)
    finetune_tasks(p, shards=returned(shards), tracking=tracking)


finetune = tracked_pipeline(
    "finetune",
    "Fine-tunes and evaluates a pre-trained mPLUG-Video on a task.",
    source="pretrained",
    last_stages="gate register",
    configs=["classification"],
    run_name="finetune",
)(tune)
