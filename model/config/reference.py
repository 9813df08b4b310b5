"""The page docs/configuration.md, generated from the docstrings of the fields: `make reference`."""

import re
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from model.config.networks import Section
from model.config.schema import RunConfig

SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
INTRODUCTION = """\
# Configuration reference

All fields of a run, generated from [model/config/schema.py](../model/config/schema.py) by `make reference`. The presets
in [model/configs](../model/configs) set some of them; any field can be overridden on the command line:
`mplug train PRESET section.field=value`.
"""


def render_reference() -> str:
    """The whole page as Markdown."""
    return "\n".join([INTRODUCTION, *_section(RunConfig, "")])


def _section(section: type[Section], prefix: str) -> Iterator[str]:
    title = f"`{prefix.rstrip('.')}`" if prefix else "Top level"
    yield f"## {title}\n\n{_line(section.__doc__)}\n"
    fields = {name: field for name, field in section.model_fields.items() if not _is_section(field)}
    yield "| field | type | default | |\n|---|---|---|---|"
    for name, field in fields.items():
        yield f"| `{prefix}{name}` | {_type(field)} | {_default(field)} | {_line(field.description)} |"
    yield ""
    for name, field in section.model_fields.items():
        if _is_section(field):
            yield from _section(field.annotation, f"{prefix}{name}.")  # type: ignore[arg-type]


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, Section)


def _type(field: FieldInfo) -> str:
    bounds = [
        f"{SIGNS[name]} {getattr(item, name):g}" for item in field.metadata for name in SIGNS if hasattr(item, name)
    ]
    return ", ".join([_kind(field.annotation), *bounds])


def _kind(annotation: Any) -> str:
    if isinstance(annotation, type) and not get_args(annotation):
        return annotation.__name__
    if get_origin(annotation) is Literal:
        return " \\| ".join(f"`{choice}`" for choice in get_args(annotation))
    text = re.sub(r"typing\.Literal\[(.*)\], \.\.\.", r"\1, …", str(annotation))
    return text.replace("'", "").replace(" | ", " \\| ")


def _default(field: FieldInfo) -> str:
    value = field.default
    if isinstance(value, tuple):
        return f"`[{', '.join(f'{item:g}' if isinstance(item, float) else str(item) for item in value)}]`"
    return f"`{str(value).lower()}`" if isinstance(value, bool) else f"`{value}`" if value != "" else "empty"


def _line(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


if __name__ == "__main__":
    print(render_reference(), end="")
