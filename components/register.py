"""Registers fine-tuned models in MLflow by reference, as candidates."""

from components.image import component


@component()
def register(evaluations: list[str], promote: bool, tracking: dict[str, str], code_version: str) -> list[str]:
    """Returns name/version of each registered model. Models without pre-training are baselines, not candidates."""
    from model.evaluation.registration import register_candidates
    from model.tracking import stage

    with stage("register", tracking, {"promote": promote, "code_version": code_version}) as tracked:
        registered = register_candidates(evaluations, tracking, code_version, promote=promote)
        tracked.tags({"registered": " ".join(registered)})
        return registered
