"""HTML pages of reports: one file that needs nothing else, from templates that share a layout.

A report extends `layout.html`, or a report that does, and has its tables and pictures from `parts.html`. Whatever is
filled in is text, never markup.
"""

import base64
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from domainshuttle.pipelines.storage.files import write_bytes
from domainshuttle.platform.report.text import visible


def write_page(path: Path | str, template: str, **values: Any) -> Path:
    """Writes the page that a template makes of `values`, whole or not at all. Returns its path.

    Raises jinja2's UndefinedError for a value that the template needs and does not get, and OSError.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, _environment().get_template(template).render(values).encode())
    return path


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("domainshuttle.platform.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_seen,
    )
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode()
    return environment


def _seen(value: Any) -> Any:
    """Text without characters that no page can hold, or that would turn what stands around it."""
    is_text = isinstance(value, str) and not hasattr(value, "__html__")  # what a macro made has been through here
    return visible(value, but="\n\t") if is_text else value
