"""Scores a trained model on one split of a benchmark."""

from kfp.dsl import ClassificationMetrics, Metrics, Output

from components.image import component


@component()
def evaluate(
    trained: str, config: str, shards: dict[str, str], split: str, cpu: str, tracking: dict[str, str],
    code_version: str, baseline: str, metrics: Output[Metrics], confusion: Output[ClassificationMetrics],
) -> str:  # fmt: skip
    """Returns the URI of the evaluation: scores, chance levels and every prediction.

    With the `baseline` "untuned", the model as it was before its training is scored as well. `cpu` is that of the step,
    from which the number of threads follows.
    """
    import json
    from pathlib import Path

    from model.startup import quick_imports

    with quick_imports():
        from model.config.load import preset_dataset
        from model.errors import exit_codes
        from model.evaluation.runner import evaluate_model
        from model.threads import use_threads

    with exit_codes():
        out = f"{trained}.{split}"
        options = {"split": split, "tracking": tracking, "with_untuned": baseline == "untuned", "out": out}
        workers = [f"data.workers={use_threads(cpu) - 1}"]
        found = evaluate_model(trained, shards=shards[preset_dataset(config)], overrides=workers, **options)
        for name, value in found.scores.items():
            metrics.log_metric(name, value)
        if matrix := found.confusion:
            confusion.log_confusion_matrix(found.class_names, matrix)
        # without a file the local runner does not cache an artifact, and would repeat the evaluation
        Path(metrics.path).write_text(json.dumps(found.scores))
        Path(confusion.path).write_text(json.dumps(matrix))
        return out
