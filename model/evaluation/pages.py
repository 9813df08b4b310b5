"""Self-contained HTML pages: figures and the Chinese font are embedded."""

import base64
import io
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from fontTools import subset
from fontTools.ttLib import TTFont
from matplotlib.figure import Figure
from PIL import Image

from model.evaluation.figures import font, save_figure


def render_page(template: str, values: Mapping[str, Any]) -> str:
    """Renders a template of this folder."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    found = environment.get_template(template)
    return found.render(font=_font_for(found.render(font="", **values)), **values)


def figure_uri(figure: Figure) -> str:
    """A figure as a data URI."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figure.png"
        save_figure(figure, path)
        return _data_uri(path.read_bytes(), "image/png")


def image_uri(image: Image.Image) -> str:
    """A picture as a data URI."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return _data_uri(buffer.getvalue(), "image/jpeg")


def _font_for(text: str) -> str:
    """The Chinese font, subset to the characters of the page: a fresh Debian has no Chinese font."""
    opened = TTFont(font().get_file())
    subsetter = subset.Subsetter(subset.Options(hinting=False, layout_features=[]))
    subsetter.populate(text=text)
    subsetter.subset(opened)
    buffer = io.BytesIO()
    opened.save(buffer)
    return _data_uri(buffer.getvalue(), "font/otf")


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
