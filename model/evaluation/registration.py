"""Which evaluated models enter the registry, and what is said of them there."""

from collections.abc import Mapping, Sequence

from model import registry
from model.evaluation.runner import load


def register_candidates(evaluations: Sequence[str], where: Mapping[str, str], code_version: str) -> list[str]:
    """Registers each fine-tuned model that started from pre-training; returns "name/version" of each.

    Without a tracking server there is no registry, and nothing is registered.
    """
    registered: list[str] = []
    if not where["uri"]:
        return registered
    for evaluation in map(load, evaluations):
        if not evaluation.pretrained:
            continue
        name = f"mplug-video-{evaluation.task}"
        tags = {"task": evaluation.task, "code_version": code_version}
        tags |= {f"test.{metric}": f"{value:.4f}" for metric, value in evaluation.scores.items()}
        version = registry.register(where["uri"], name, evaluation.model, tags)
        registered.append(f"{name}/{version}")
    return registered
