"""Scores a trained model on the test split of a benchmark."""

from kfp.dsl import Metrics, Output

from components.image import component


@component()
def evaluate(
    trained: str,
    config: str,
    shards: dict[str, str],
    tracking: dict[str, str],
    code_version: str,
    baseline: str,
    metrics: Output[Metrics],
) -> str:
    """Returns the URI of the evaluation: scores, chance levels and every prediction.

    With the `baseline` "untuned", the model as it was before its training is scored as well.
    """
    import json
    from pathlib import Path

    from model.config.load import preset_dataset
    from model.errors import exit_codes
    from model.evaluation.results import save_evaluation
    from model.evaluation.runner import evaluate_model

    with exit_codes():
        evaluation = evaluate_model(
            trained, shards=shards[preset_dataset(config)], tracking=tracking, with_untuned=baseline == "untuned"
        )
        for name, value in evaluation.scores.items():
            metrics.log_metric(name, value)
        # without a file the local runner does not cache the artifact, and would repeat the evaluation
        Path(metrics.path).write_text(json.dumps(evaluation.scores))
        return save_evaluation(evaluation, f"{trained}.test.json")
