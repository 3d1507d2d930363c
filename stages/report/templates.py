"""Templates of this folder and their data -> text; HTML pages bring their styles, script and pictures along."""

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from stages.report.terms import term

WORDS = {"good": "Good", "changed": "Changed", "worse": "Bad"}
"""Level of a verdict -> the word that stands before it, since colour alone does not tell."""
SCRIPT = "page.js.j2"


def environment(*, autoescape: bool) -> Environment:
    """Load the templates of this folder; an undefined name is an error. HTML is escaped, Markdown is not."""
    folder = FileSystemLoader(Path(__file__).parent)
    templates = Environment(loader=folder, autoescape=autoescape, undefined=StrictUndefined)  # noqa: S701
    templates.trim_blocks = templates.lstrip_blocks = True
    return templates


def render(name: str, **data: Any) -> str:  # noqa: ANN401  # whatever the template shows
    """Render a page. Its content security policy allows its own script by hash, and no request."""
    templates = environment(autoescape=True)
    script = templates.get_template(SCRIPT).render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    shared = {"script": Markup(script), "script_hash": f"sha256-{digest}", "term": term}  # noqa: S704  # our own file
    return templates.get_template(name).render(**shared, **data)


def embed(content: bytes, kind: str) -> str:
    """Write a picture as an address that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def embed_figures(figures: Mapping[str, Mapping[str, bytes]]) -> dict[str, dict[str, str]]:
    """Write figures, name -> theme -> SVG, as addresses."""
    return {name: {theme: embed(svg, "svg+xml") for theme, svg in themes.items()} for name, themes in figures.items()}
