"""Common parts of all pipelines: parameters as a class, a run in MLflow, and an exit handler around the stages.

kfp reads the parameters of a pipeline from the signature of a function. Here they are the fields of a class, each
declared once with type, default and description. The decorators derive the signature from the class.
"""

from collections.abc import Callable
from inspect import Parameter, Signature, signature
from typing import Any

from kfp import dsl

from components.finish_run import finish_run
from components.start_run import start_run
from model.config.networks import Section
from pipelines.placement import place

CLUSTER_MLFLOW = "http://mlflow.mplug.svc:5000"


class Parameters(Section):
    """Parameters of every pipeline."""

    root: str = "s3://mplug/work"
    """s3:// URI under which everything is written."""
    code_version: str
    """Version of the code; a new one runs every stage again."""
    image: str
    """Image of every step."""
    tracking_uri: str = CLUSTER_MLFLOW
    """MLflow tracking server."""
    experiment: str = "mplug-video"
    """MLflow experiment."""
    run_name: str
    """Name of the pipeline's MLflow run. A repeated run with the same name continues it."""
    num_frames: int = 16
    """Frames stored per clip."""
    short_side: int = 256
    """Shorter side of stored frames, in pixels."""
    overrides: list[str] = []
    """dotted.key=value settings for every training stage."""


class JobParameters(Parameters):
    """Parameters of the pipelines that train in jobs on a cluster."""

    image: str
    """Image of the training pods and of the evaluations."""
    cpu_image: str
    """Image of the steps that need no GPU: the same, or the smaller one without CUDA."""
    nodes: int = 1
    """Pods of each training job; 0: train in the step itself."""
    processes: int = 0
    """Training processes per node; 0: one per GPU of the PodTemplate."""
    namespace: str = "mplug"
    """Namespace of the training jobs."""
    deadline_hours: float = 0.0
    """Deadline of each training job in hours, after which it is suspended; 0: none."""
    shard_cpu: str = "30"
    """CPU of a decoding step, as a Kubernetes quantity."""
    shard_memory: str = "60Gi"
    """Memory of a decoding step."""
    train_cpu: str = "500m"
    """CPU of a step that follows a training job, or that trains itself with 0 nodes."""
    train_memory: str = "2Gi"
    """Memory of that step."""


def tracked_pipeline(name: str, description: str, *, source: str, last_stages: str, **defaults: Any) -> Any:
    """Turns a function (parameters, tracking settings), which connects the stages, into a pipeline.

    The pipeline opens its MLflow run first, which records the parameter `source`, and closes it after the stages,
    whatever the outcome. It has succeeded if the runs of `last_stages` are finished. `defaults` override those of the
    class.
    """

    def decorate(stages: Callable[[Any, Any], None]) -> Any:
        kind = next(iter(signature(stages).parameters.values())).annotation
        parameters = _parameters(kind, defaults)

        def pipeline(*channels: Any) -> None:
            p = _filled(kind, parameters, channels)
            image = getattr(p, "cpu_image", p.image)
            common = {"tracking_uri": p.tracking_uri, "experiment": p.experiment, "run_name": p.run_name}
            last = finish_run(
                last_stages=last_stages.format(**vars(p)), namespace=getattr(p, "namespace", ""), **common
            )
            place(last, image).set_caching_options(False)
            with dsl.ExitHandler(last, name="stages"):
                opened = start_run(source=getattr(p, source), root=p.root, **common)
                # a repeated pipeline reopens its run; the output is the same, so later steps stay cached
                place(opened, image).set_caching_options(False)
                stages(p, opened.output)

        pipeline.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        fields = [f"  {key}: {' '.join((field.description or '').split())}" for key, field in kind.model_fields.items()]
        pipeline.__doc__ = "\n".join([description, "", "Args:", *fields])
        return dsl.pipeline(name=f"mplug-video-{name}" if name else "mplug-video", description=description)(pipeline)

    return decorate


def inner_pipeline(name: str) -> Any:
    """Turns a function (parameters, outputs of earlier stages …) into a pipeline that can be nested in another.

    In a loop, kfp 2.17's local runner replaces every output of a sibling task by the item of the loop, but not the
    inputs of the enclosing pipeline. So a loop that uses outputs needs an enclosing pipeline, which gets all
    parameters.
    """

    def decorate(body: Callable[..., Any]) -> Callable[..., Any]:
        first, *outputs = signature(body).parameters.values()
        kind = first.annotation
        parameters = [parameter.replace(default=Parameter.empty) for parameter in _parameters(kind, {})]

        def pipeline(*channels: Any) -> Any:
            return body(_filled(kind, parameters, channels), *channels[len(parameters) :])

        whole = Signature([*parameters, *outputs], return_annotation=signature(body).return_annotation)
        pipeline.__signature__ = whole  # type: ignore[attr-defined]
        component = dsl.pipeline(name=f"mplug-video-{name}")(pipeline)
        return lambda p, **outputs: component(**vars(p), **outputs)

    return decorate


def call_step(component: Any, p: Parameters, **inputs: Any) -> Any:
    """A step with the given `inputs`. Its other inputs are the parameters of the same name."""
    wanted = component.component_spec.inputs.keys() - inputs.keys()
    return component(**{key: getattr(p, key) for key in wanted}, **inputs)


def returned(step: Any) -> Any:
    """The value that a step returns, beside its artifacts."""
    return step.outputs["Output"]


def _parameters(kind: type[Parameters], defaults: dict[str, Any]) -> list[Parameter]:
    """The fields of a class as parameters, without defaults first."""
    found = [
        Parameter(
            key,
            Parameter.POSITIONAL_OR_KEYWORD,
            annotation=field.annotation,
            default=defaults.get(key, Parameter.empty if field.is_required() else field.default),
        )
        for key, field in kind.model_fields.items()
    ]
    return sorted(found, key=lambda parameter: parameter.default is not Parameter.empty)


def _filled(kind: Any, parameters: list[Parameter], channels: tuple[Any, ...]) -> Any:
    """The parameters with kfp's channels as values."""
    names = [parameter.name for parameter in parameters]
    return kind.model_construct(**dict(zip(names, channels, strict=False)))
