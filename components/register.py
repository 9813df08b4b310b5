"""Registers fine-tuned models in MLflow by reference, as candidates."""

from components.image import component


@component()
def register(
    evaluations: list[str], promote: bool, tolerance: float, image: str, tracking: dict[str, str], code_version: str
) -> list[str]:
    """Returns name/version of each registered model. Models without pre-training are baselines, not candidates.

    With `promote`, they also become champions, if they pass the gate.
    """
    from model.evaluation.promotion import promote_all
    from model.evaluation.registration import register_candidates
    from model.tracking import stage

    with stage("register", tracking, {"promote": promote, "code_version": code_version}) as tracked:
        registered = register_candidates(evaluations, tracking, code_version, image)
        if promote:
            promote_all(tracking["uri"], registered, tolerance)
        tracked.tags({"registered": " ".join(registered)})
        return registered
