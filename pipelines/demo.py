"""The whole platform as one pipeline: download -> shards -> pre-training -> fine-tuning -> registry and report.

The same definition runs in kfp's local runner (`mplug pipeline run`) and on a cluster (`mplug pipeline submit`). Stages
pass URIs; data and weights stay in object storage. The models are tiny; pretrain.py, finetune.py and benchmark.py train
the full sizes.
"""

from typing import Any

from kfp import dsl

from components.download import download
from components.evaluate import evaluate
from components.register import register
from components.report import report
from components.shard import shard
from components.train import train
from components.train_tokenizer import train_tokenizer
from pipelines.placement import place, set_resources
from pipelines.tracked import Parameters, call_step, inner_pipeline, returned, tracked_pipeline

DEMO_DATASETS = ["pretrain", "classification", "retrieval", "captioning", "instruction"]
BENCHMARKS = [
    {"config": "tiny_instruction", "init": "random", "baseline": "untuned"},
    *(
        {"config": f"tiny_{task}", "init": init, "baseline": ""}
        for init in ("pretrained", "random")
        for task in ("classification", "retrieval", "captioning")
    ),
]
"""Each benchmark is fine-tuned twice: from the pre-trained model, and from fresh weights for comparison. Instruction
tuning, which takes longest, starts first; it is compared with the untuned model."""
IN_THE_STEP = {"nodes": 0, "namespace": "", "deadline_hours": 0.0}
"""Arguments to train in the step itself, without a job."""


class DemoParameters(Parameters):
    source: str
    """Folder or s3:// URI of the dataset as published."""
    root: str
    """Folder or s3:// URI under which everything is written."""
    tracking_uri: str
    """MLflow tracking server."""
    source_version: str = ""
    """Version of the source; a new one copies changed files."""
    dataset: str = "youku-mplug"
    """Name of the dataset under <root>/raw."""
    processes: int = 2
    """Training processes of the pre-training."""
    vocab_size: int = 448
    """Tokens of each tokenizer."""
    cpu: str = "500m"
    """CPU of each computing step, as a Kubernetes quantity."""
    memory: str = "4Gi"
    """Memory of each computing step."""


def compute(step: Any, p: DemoParameters) -> Any:
    """Sets image, CPU and memory of a step."""
    return set_resources(place(step, p.image), cpu=p.cpu, memory=p.memory)


@inner_pipeline("benchmarks")
def benchmarks(
    p: DemoParameters,
    shards: dict[str, str],
    decoder: str,
    tokenizers: dict[str, str],
    pretrained: str,
    tracking: dict[str, str],
) -> None:
    """Fine-tunes and evaluates every benchmark, registers the candidates and writes the report."""
    given = {"shards": shards, "tracking": tracking}
    # one process each, two at a time: on two cores this is faster than one run with two processes
    with dsl.ParallelFor(BENCHMARKS, parallelism=2) as benchmark:
        weights = {"decoder": decoder, "tokenizers": tokenizers, "pretrained": pretrained, "init": benchmark.init}
        tuned = compute(call_step(train, p, config=benchmark.config, processes=1, **weights, **IN_THE_STEP, **given), p)
        judged = compute(
            call_step(
                evaluate,
                p,
                trained=returned(tuned),
                config=benchmark.config,
                baseline=benchmark.baseline,
                split="test",
                **given,
            ),
            p,
        )

    # a separate Collected for each consumer: the compiler modifies it
    found = dsl.Collected(returned(judged))
    place(call_step(register, p, evaluations=found, promote=False, tolerance=0.0, tracking=tracking), p.image)
    compute(call_step(report, p, evaluations=dsl.Collected(returned(judged)), tracking=tracking), p)


@tracked_pipeline(
    "",
    "Pre-trains mPLUG-Video, fine-tunes it on three benchmarks and an mPLUG-Owl on conversations, evaluates them.",
    source="source",
    last_stages="register report",
    run_name="mplug-video",
    short_side=72,
)
def demo_pipeline(p: DemoParameters, tracking: Any) -> None:
    raw = compute(call_step(download, p, partition="1/1", tracking=tracking), p)
    stored = {"raw": raw.output, "raw_version": p.source_version, "tracking": tracking}
    shards = compute(call_step(shard, p, datasets=DEMO_DATASETS, partition="1/1", **stored), p)
    tokenizers = compute(call_step(train_tokenizer, p, datasets=["pretrain", "instruction"], **stored), p).output
    given = {"shards": returned(shards), "pretrained": "", "tracking": tracking, **IN_THE_STEP}
    titles = {"decoder": "", "tokenizers": tokenizers, "init": "titles"}
    decoder = returned(compute(call_step(train, p, config="tiny_decoder", processes=1, **titles, **given), p))
    weights = {"decoder": decoder, "tokenizers": {}, "init": "random"}
    pretrained = compute(call_step(train, p, config="tiny_pretraining", **weights, **given), p)
    given = {"shards": returned(shards), "decoder": decoder, "tokenizers": tokenizers, "tracking": tracking}
    benchmarks(p, pretrained=returned(pretrained), **given)
