"""A hook of mkdocs: the site has the pages of docs alone, so links to files outside become names."""

import re

OUTSIDE = re.compile(r"\[([^\]]*)\]\((?:\.\./)+[^)]*\)")


def on_page_markdown(markdown: str, **_: object) -> str:
    """Return a page in which a link that leaves ``docs`` is its text."""
    return OUTSIDE.sub(r"\1", markdown)
