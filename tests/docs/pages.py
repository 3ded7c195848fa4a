"""The pages for users, and what can be checked in them: blocks, commands, links, names."""

import re
import shlex
from typing import NamedTuple

from ..conftest import ROOT

PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROGRAMS = r"(?:\.venv/bin/)?(?:spo-ray|make|python|ray|docker|kubectl|pip|pre-commit|ssh|export)"
INLINE = re.compile(rf"`({PROGRAMS} [^`\n]+)`")


class Block(NamedTuple):
    page: str
    language: str
    text: str


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def prose_of(page: str) -> str:
    """A page without its blocks."""
    return FENCE.sub("", text_of(page))


def blocks(language: str) -> list[Block]:
    return [Block(page, *found) for page in PAGES for found in FENCE.findall(text_of(page)) if found[0] == language]


def shell_commands() -> list[str]:
    """Every command of the sh blocks once, without comments."""
    lines = [line for block in blocks("sh") for line in re.sub(r"\\\n\s*", "", block.text).splitlines()]
    return _once(shlex.split(line, comments=True) for line in lines)


def inline_commands() -> list[str]:
    """Every command within the text once; what follows an option may be a placeholder."""
    return _once(shlex.split(text) for page in PAGES for text in INLINE.findall(prose_of(page)))


def _once(found) -> list[str]:
    return list(dict.fromkeys(shlex.join(words).removeprefix(".venv/bin/") for words in found if words))
