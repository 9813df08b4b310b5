"""The gate before the registry: fails if a model is worse than the champion of its task."""

from components.image import component


@component()
def gate(
    evaluations: list[str],
    root: str,
    minimum: dict[str, float],
    tolerance: float,
    tracking: dict[str, str],
    code_version: str,
) -> list[str]:
    """Returns the evaluations if all of them pass; fails otherwise."""
    from model.evaluation.gate import check_gate
    from model.tracking import stage

    with stage("gate", tracking, {"tolerance": tolerance, "code_version": code_version}) as tracked:
        for row in check_gate(evaluations, root, tracking, minimum, tolerance):
            tracked.metrics({f"{row.task}/{row.metric}": row.value})
        return evaluations
