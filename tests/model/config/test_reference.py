"""The configuration reference in docs/."""

import pytest

from model.config.networks import Section
from model.config.reference import render_reference
from model.config.schema import RunConfig
from tests.helpers.paths import ROOT


def test_the_page_is_current() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == render_reference(), "docs/configuration.md is stale: run `make reference`"


def fields(section: type[Section], prefix: str = "") -> list[tuple[str, str | None]]:
    found = []
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found += fields(field.annotation, f"{prefix}{name}.")
        else:
            found.append((prefix + name, field.description))
    return found


@pytest.mark.parametrize(("name", "description"), fields(RunConfig))
def test_every_field_has_a_description(name: str, description: str | None) -> None:
    assert description, name
    assert f"`{name}`" in render_reference()
