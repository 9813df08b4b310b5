"""All benchmarks of the paper from one checkpoint: fine-tuned beside each other, compared, gated, registered."""

from pipelines.finetune import tasks_pipeline

benchmark = tasks_pipeline(
    "benchmark",
    "Fine-tunes and judges a pre-trained mPLUG-Video on all three benchmarks.",
    ["classification", "retrieval", "captioning"],
)
