"""What all pipelines share: parameters as a class, a run in MLflow, and an exit handler around the stages.

kfp reads a pipeline's parameters from the signature of a function. Here they are fields of a class, each declared once
with its type, default and meaning; the decorators make the signature of them.
"""

from collections.abc import Callable
from inspect import Parameter, Signature, signature
from typing import Any

from kfp import dsl

from components.finish_run import finish_run
from components.start_run import start_run
from model.config.schema import Section
from pipelines.placement import place

CLUSTER_MLFLOW = "http://mlflow.mplug.svc:5000"


class Parameters(Section):
    """Parameters of every pipeline."""

    root: str = "s3://mplug/work"
    """s3:// URI under which everything is written."""
    code_version: str
    """Names the code; a new one runs every stage again."""
    image: str
    """Image of every step."""
    tracking_uri: str = CLUSTER_MLFLOW
    """MLflow tracking server."""
    experiment: str = "mplug-video"
    """MLflow experiment."""
    run_name: str
    """Names the pipeline's MLflow run; a repeated run with the same name continues it."""


def tracked_pipeline(name: str, description: str, *, source: str, last_stages: str, **defaults: Any) -> Any:
    """Makes a pipeline of a function (parameters, tracking settings) that wires the stages.

    Opens the run in MLflow before them, with the parameter `source` as what it starts from, and closes it after them,
    however they end; `last_stages` are those whose runs must be finished then. `defaults` replace those of the class.
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
                # a repeated pipeline opens its run again; the id stays, and with it the cache of what follows
                place(opened, image).set_caching_options(False)
                stages(p, opened.output)

        pipeline.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        fields = [f"  {key}: {' '.join((field.description or '').split())}" for key, field in kind.model_fields.items()]
        pipeline.__doc__ = "\n".join([description, "", "Args:", *fields])
        return dsl.pipeline(name=f"mplug-video-{name}" if name else "mplug-video", description=description)(pipeline)

    return decorate


def inner_pipeline(name: str) -> Any:
    """Makes a pipeline inside another one of a function (parameters, outputs of other stages …).

    kfp 2.17's local runner hands a loop its item in place of every output of a sibling task, but leaves the inputs of
    the pipeline around it alone. So a loop that reads outputs has a pipeline of its own, which gets all parameters.
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
    """A step whose inputs are `inputs`, and of the rest the parameters of the same name."""
    wanted = component.component_spec.inputs.keys() - inputs.keys()
    return component(**{key: getattr(p, key) for key in wanted}, **inputs)


def _parameters(kind: type[Parameters], defaults: dict[str, Any]) -> list[Parameter]:
    """The fields of a class as parameters, those without a default first."""
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
    """The parameters with kfp's channels in place of values."""
    return kind.model_construct(
        **{parameter.name: value for parameter, value in zip(parameters, channels, strict=False)}
    )
