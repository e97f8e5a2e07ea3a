"""HTML from the templates in `qwenla_jax/templates`: all text is escaped, and a name without a value is an error."""

from __future__ import annotations

import base64
import functools
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenla_jax.utils.atomic_files import write_text

if TYPE_CHECKING:
    from jinja2 import Environment
    from PIL import Image

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")  # all that HTML does not allow in text


def render(template: str, **values: Any) -> str:
    """A template, a file of `qwenla_jax/templates`, with its values, which are escaped.

    Control characters become their symbols (U+2400 on), lone surrogates question marks, so the result is valid HTML
    and UTF-8 whatever a model wrote.

    Raises:
      jinja2.UndefinedError: the template names something that is not given.
    """
    return _environment().get_template(template).render(values)


def valid_text(text: str) -> str:
    """Text as files of HTML and PDF may hold it: control characters as their symbols, lone surrogates as "?"."""
    return _CONTROL.sub(lambda match: chr(0x2400 + ord(match[0])), text).encode("utf-8", "replace").decode("utf-8")


def write_page(path: Path, template: str, **values: Any) -> None:
    """Writes `render`'s result, whole or not at all; a page that is there is replaced."""
    write_text(path, render(template, **values))


def data_uri(data: bytes, media_type: str) -> str:
    """The bytes of a file as a URI that holds them."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode('ascii')}"


def image_uri(image: Image.Image, form: str = "PNG", largest_side: int | None = None, **options: Any) -> str:
    """An image of any mode in RGB as a data URI; in templates a filter.

    `form` is "PNG" or "JPEG", with options of Pillow's writer. An image with a side above `largest_side` pixels is
    shrunk.
    """
    small = image.convert("RGB")
    if largest_side is not None:
        small.thumbnail((largest_side, largest_side))
    buffer = io.BytesIO()
    small.save(buffer, form, **options)
    return data_uri(buffer.getvalue(), f"image/{form.lower()}")


@functools.cache
def _environment() -> Environment:
    # Imported here: only a process that draws a page pays for it.
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    def valid(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return Markup(valid_text(value)) if isinstance(value, Markup) else valid_text(value)

    environment = Environment(
        loader=PackageLoader("qwenla_jax"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=valid,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["image_uri"] = image_uri
    return environment
