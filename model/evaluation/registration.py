"""Registers evaluated models in MLflow."""

import hashlib
import json
from collections.abc import Mapping, Sequence

from model import manifest, registry, storage
from model.evaluation.results import EVALUATION, SCORES, Evaluation, load_evaluation


def registered_name(task: str) -> str:
    return f"mplug-video-{task}"


def register_candidates(
    evaluations: Sequence[str], where: Mapping[str, str], code_version: str, image: str = ""
) -> list[str]:
    """Registers each fine-tuned model that started from pre-training or was compared with the untuned model.

    Returns "name/version" of each. Does nothing if no tracking server is configured.
    """
    registered: list[str] = []
    if not where["uri"]:
        return registered
    for uri in evaluations:
        evaluation = load_evaluation(uri)
        if not (evaluation.pretrained or evaluation.untuned):
            continue
        name = registered_name(evaluation.task)
        tags = _tags(evaluation, uri) | {"code_version": code_version, "image": image}
        version = registry.register_model(where["uri"], name, evaluation.model, tags)
        registered.append(f"{name}/{version}")
    return registered


def _tags(evaluation: Evaluation, uri: str) -> dict[str, str]:
    """Where a version comes from, and its metrics with their intervals."""
    facts, split = manifest.read_manifest(evaluation.model), evaluation.protocol["split"]
    tags = {
        "task": evaluation.task,
        "headline": f"{split}.{evaluation.headline}",
        "data": evaluation.protocol["data"],
        "protocol": evaluation.protocol_line,
        "config": json.dumps(facts["config"], ensure_ascii=False),
        "base_sha256": facts.get("base_sha256", ""),
        EVALUATION: uri,
        "evaluation_sha256": hashlib.sha256(storage.read(storage.join(uri, SCORES))).hexdigest(),
    }
    for metric, value in evaluation.scores.items():
        low, high = evaluation.intervals[metric]
        tags |= {f"{split}.{metric}": f"{value:.4f}", f"{split}.{metric}.interval": f"{low:.4f} to {high:.4f}"}
    return tags
