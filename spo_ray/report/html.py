"""Pieces of HTML: everything is escaped unless it is :class:`Html`."""

import json
import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from html import escape
from typing import Any

STYLE = """
:root{--ink:#1c2430;--paper:#fff;--faint:#66707f;--line:#d8dde5;--panel:#f6f7f9;--good:#1b7837;--bad:#b2182b}
:root{--mark:#ffe9a8}
@media screen and (prefers-color-scheme:dark){
:root{--ink:#e6e9ee;--paper:#14181f;--faint:#98a2b3;--line:#333b48;--panel:#1c222b;--good:#5ab878;--bad:#ff8a80}
:root{--mark:#5c4a10}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:62rem}
body{margin:2rem auto;padding:0 1rem;overflow-wrap:break-word}
h1{font-size:1.6rem;margin-bottom:.2rem}
h2{font-size:1.15rem;margin-top:2.2rem}
h3{font-size:1rem}
a{color:inherit;text-decoration-color:var(--faint)}
p.note{color:var(--faint);font-size:.9rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.92rem}
th,td{text-align:right;padding:.3rem .7rem;border-bottom:1px solid var(--line)}
td{white-space:nowrap}
th:first-child,td:first-child{text-align:left}
@media screen{
.scroll th:first-child:not(.text),.scroll td:first-child:not(.text){position:sticky;left:0;background:var(--paper)}
.scroll td:first-child:not(.text){max-width:40vw;white-space:normal}
}
details{margin:.4rem 0}
summary{cursor:pointer}
pre{background:var(--panel);padding:.7rem;overflow-x:auto;font-size:.8rem}
td.text,th.text{text-align:left;vertical-align:top;min-width:9rem;font-size:.85rem;white-space:pre-wrap}
.right,.rose{color:var(--good)}
.wrong,.fell{color:var(--bad)}
.fell{font-weight:600}
mark{background:var(--mark);color:inherit}
.figure{overflow-x:auto;min-height:60px;margin-top:1rem}
footer{margin-top:3rem;color:var(--faint);font-size:.85rem}
@media print{
details::details-content{content-visibility:visible;display:block;block-size:auto}
:root,body{font-size:11px}
body{max-width:none;margin:0}
.scroll,.figure,pre{overflow:visible}
.figure,tr{break-inside:avoid}
h2,h3{break-after:avoid}
.figure svg{max-width:100%;height:auto}
table{font-size:8px}
th,td,td.text,th.text{min-width:0;font-size:8px;padding:.2rem .35rem}
td{white-space:normal}
pre{white-space:pre-wrap;font-size:8px}}
"""
DRAW = """
for (const figure of document.querySelectorAll('.figure')) {
  const spec = JSON.parse(figure.querySelector('script').textContent);
  const room = figure.clientWidth - 60;
  if (spec.facet) spec.columns = Math.max(1, Math.min(spec.columns, Math.floor(room / 250)));
  else if (!spec.usermeta && spec.width > room) spec.width = Math.max(200, room);
  vegaEmbed(figure.querySelector('div'), spec, {renderer: 'svg', actions: false});
}
"""


class Html(str):
    """Text that is HTML already."""


def text(value: str) -> Html:
    """Escaped, unless it is HTML."""
    return value if isinstance(value, Html) else Html(escape(value))


def link(value: str, target: str) -> Html:
    """A link to a file of the run, relative to the page."""
    return Html(f'<a href="{escape(target)}">{escape(value)}</a>')


def table(header: Sequence[str], lines: Sequence[Sequence[str]], *, words: int | None = None, change: str = "") -> str:
    """A table; column number ``words`` holds text, the column named ``change`` marks signs in colour."""
    kinds = ["text" if i == words else "" for i in range(len(header))]
    head = "".join(cell(name, kind, "th") for name, kind in zip(header, kinds, strict=True))
    body = ""
    for line in lines:
        marks = [sign(value) if name == change else kind for name, kind, value in zip(header, kinds, line, strict=True)]
        body += f"<tr>{''.join(map(cell, line, marks))}</tr>"
    return f"<div class=scroll><table><tr>{head}</tr>{body}</table></div>"


def cell(value: str, kind: str = "", tag: str = "td") -> str:
    """One cell of a CSS class."""
    return f'<{tag} class="{kind}">{text(value)}</{tag}>' if kind else f"<{tag}>{text(value)}</{tag}>"


def sign(value: str) -> str:
    """The CSS class of a signed figure."""
    return {"-": "fell", "+": "rose"}.get(re.sub("^<a [^>]*>", "", value)[:1], "")


def details(title: str, content: str) -> str:
    """Something that opens on a click."""
    return f"<details><summary>{text(title)}</summary>{content}</details>"


def note(content: str) -> str:
    """A remark below a figure or a table."""
    return f"<p class=note>{text(content)}</p>"


def marked(value: str, other: str) -> Html:
    """A text with the words marked that another one does not have there."""
    mine, theirs = (re.findall(r"\s+|\w+|[^\w\s]", words) for words in (value, other))
    parts = []
    for operation, _, _, start, end in SequenceMatcher(None, theirs, mine, autojunk=False).get_opcodes():
        part = escape("".join(mine[start:end]))
        parts.append(part if operation == "equal" or not part else f"<mark>{part}</mark>")
    return Html("".join(parts))


def figure(spec: Mapping[str, Any]) -> str:
    """A Vega-Lite figure, drawn by the page's script."""
    content = json.dumps(spec).replace("</", "<\\/")
    return f'<div class=figure><div></div><script type="application/json">{content}</script></div>'


def page(title: str, sections: Sequence[str], footer: str) -> str:
    """A self-contained page, with the code for its figures if it has any."""
    body = "\n".join(sections)
    code = ""
    if "<div class=figure>" in body:
        import vl_convert

        bundle = vl_convert.javascript_bundle(DRAW).replace("</script", "<\\/script")
        code = f'<noscript>The figures need JavaScript.</noscript><script type="module">{bundle}</script>'
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head>\n"
        f"<body>\n{body}\n<footer>{text(footer)}</footer>{code}</body></html>\n"
    )
