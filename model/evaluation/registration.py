"""Registers evaluated models in MLflow."""

from collections.abc import Mapping, Sequence

from model import registry
from model.evaluation.results import load_evaluation


def registered_name(task: str) -> str:
    return f"mplug-video-{task}"


def register_candidates(
    evaluations: Sequence[str], where: Mapping[str, str], code_version: str, *, promote: bool = False
) -> list[str]:
    """Registers each fine-tuned model that started from pre-training or was compared with the untuned model.

    Returns "name/version" of each. `promote` also gives them the alias `champion`. Does nothing if no tracking server
    is configured.
    """
    registered: list[str] = []
    if not where["uri"]:
        return registered
    for evaluation in map(load_evaluation, evaluations):
        if not (evaluation.pretrained or evaluation.untuned):
            continue
        name = registered_name(evaluation.task)
        tags = {"task": evaluation.task, "code_version": code_version}
        tags |= {
            f"{evaluation.protocol['split']}.{metric}": f"{value:.4f}" for metric, value in evaluation.scores.items()
        }
        version = registry.register_model(where["uri"], name, evaluation.model, tags)
        if promote:
            registry.promote_model(where["uri"], name, version)
        registered.append(f"{name}/{version}")
    return registered
