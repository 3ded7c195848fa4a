"""HTML pages from the Jinja2 templates in ``templates/``, which escape all text; Python code prepares plain data."""

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from functools import cache
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined, Template


class Link(NamedTuple):
    """A table cell that links to a file."""

    text: str
    target: str
    """URL of the file, relative to the page."""


Cell = str | Link


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


def differing(value: str, other: str) -> list[tuple[str, bool]]:
    """Split ``value`` into pieces, each with True if ``other`` does not have its words in that place."""
    mine, theirs = (re.findall(r"\s+|\w+|[^\w\s]", words) for words in (value, other))
    matches = SequenceMatcher(None, theirs, mine, autojunk=False).get_opcodes()
    return [("".join(mine[start:end]), kind != "equal") for kind, _, _, start, end in matches if start < end]
