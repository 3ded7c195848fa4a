"""HTML pages from the Jinja2 templates in ``templates/``, which escape all text; Python code prepares plain data."""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined, Template


class Link(NamedTuple):
    """A table cell that links to a file."""

    text: str
    target: str
    """URL of the file, relative to the page."""


class Shade(NamedTuple):
    """A cell that is coloured by a difference."""

    text: str
    level: int = 0
    """From -2, clearly below, to 2, clearly above; 0: not distinguishable from noise."""


Cell = str | Link | Shade


class Table(NamedTuple):
    """A table of a page."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    """One cell for each column of the header."""


def render(template: str | Template, **data: Any) -> str:
    """Return a self-contained page; every page needs ``versions``, the package versions in the footer."""
    return environment().get_template(template).render(data, figure_code=_figure_code())


@cache
def environment() -> Environment:
    """Return the Jinja2 environment of all templates. A missing value is an error."""
    found = Environment(
        loader=PackageLoader("spo_ray.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.policies["json.dumps_kwargs"] = {}  # the default sorts keys: tables inside figures would change their order
    return found


@cache
def _figure_code() -> str:
    """Return Vega-Embed and ``draw.js`` in one script. It is not data, so the base template does not escape it."""
    import vl_convert

    script = environment().get_template("draw.js").render()
    return vl_convert.javascript_bundle(script).replace("</script", "<\\/script")
