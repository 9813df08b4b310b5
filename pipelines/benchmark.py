"""All benchmarks of the paper from one checkpoint: fine-tuned in parallel, evaluated, gated, registered."""

from pipelines.finetune import tune
from pipelines.tracked import tracked_pipeline

benchmark = tracked_pipeline(
    "benchmark",
    "Fine-tunes and evaluates a pre-trained mPLUG-Video on all three benchmarks.",
    source="pretrained",
    last_stages="gate register",
    configs=["classification", "retrieval", "captioning"],
    run_name="benchmark",
)(tune)
