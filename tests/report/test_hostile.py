"""Strings that look like HTML in names, answers, settings and figures: pages show them and run nothing."""

import json
import random
import shutil
from html.parser import HTMLParser

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spo_ray.pipeline import cli
from spo_ray.report.page import environment, render
from spo_ray.runtime.artifact import recorded_files

HOSTILE = "<!--<script>\"'&lt;{{ 7 * 7 }}</script><img src=x onerror=document.title='run'>"
LABEL = HOSTILE.replace("/", "")
"""Name of a folder, so without a slash."""
TAGS = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "div", "table", "tr", "th", "td", "a"}
TAGS |= {"script", "noscript", "details", "summary", "pre", "code", "mark", "footer", "small", "b", "br", "span"}
TAGS |= {"label", "select", "option", "input", "output", "ul", "li", "wbr"}
PIECES = [
    "<!--",
    "-->",
    "<script>",
    "</script >",
    "<![CDATA[",
    "]]>",
    "&lt;",
    "&#0;",
    "{{ x }}",
    "{% x %}",
    "'",
    '"',
    "`",
    "=",
    "\\",
]
PIECES += [
    "<img src=//x/y onerror=1>",
    "<svg onload=1>",
    "<base href=//x>",
    "<link rel=stylesheet href=//x>",
    "</style>",
]
PIECES += [
    "<iframe srcdoc=x>",
    "<meta http-equiv=refresh content=0>",
    "</title>",
    "</textarea>",
    "<plaintext>",
    "<template>",
]
PIECES += [
    "javascript:1",
    "url(//x)",
    "\u2028",
    "\x1b[2J",
    "\ud7ff\uffff",
    "\u202e",
    "🤖",
    " ",
    "\n",
    "a",
    "</div></table>",
    "<math><mi>",
]
FIGURES = {"run": 6, "sweep": 3, "comparison": 4}


@pytest.fixture(scope="module")
def pages(folder, tmp_path_factory):
    """The pages of a run and of a sweep, and their comparison."""
    root = tmp_path_factory.mktemp("hostile")
    run = shutil.copytree(folder / "a", root / LABEL)
    sweep = shutil.copytree(folder / "s", root / f"s{LABEL}")
    for own in (run, sweep):
        config = json.loads((own / "config.json").read_text())
        config["model"]["path"] = HOSTILE
        (own / "config.json").write_text(json.dumps(config))
    for name, columns in {"eval_dpo": ["response"], "pairs": ["prompt", "chosen"], "data_test": ["prompt"]}.items():
        rewrite(run / name / "part-0.parquet", columns)
    rewrite(run / "pairs" / "rejected.parquet", ["id", "reason", "excerpt"])
    trial = (sweep / "trials" / "00000").rename(sweep / "trials" / LABEL)
    row = json.loads((trial / "row.json").read_text())
    (trial / "row.json").write_text(json.dumps(row | {"trial": LABEL, "reason": HOSTILE}))
    for manifest in (*run.glob("*/manifest.json"), *sweep.glob("*/manifest.json")):
        changed = json.loads(manifest.read_text()) | {"files": recorded_files(manifest.parent)}
        manifest.write_text(json.dumps(changed))
    for arguments in ([run], [sweep], [run, sweep, "--out", root / "both.html"]):
        assert not cli.app(["report", *map(str, arguments)], exit_on_error=False, result_action="return_value")
    own_pages = {"run": run, "sweep": sweep}
    return {name: own / "report" / "index.html" for name, own in own_pages.items()} | {"comparison": root / "both.html"}


def rewrite(file, columns):
    table = pq.read_table(file)
    for name in columns:
        old = table.column(name).to_pylist()
        new = [f"{HOSTILE} {i}" if isinstance(value, str) else value for i, value in enumerate(old)]
        table = table.set_column(table.column_names.index(name), name, pa.array(new, table.schema.field(name).type))
    pq.write_table(table, file)


class Page(HTMLParser):
    """A page's tags, their attributes, its text, and its scripts by type."""

    def __init__(self, text):
        super().__init__()
        self.open = None
        self.tags, self.attributes, self.texts, self.scripts = set(), set(), [], {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.open = dict(attrs).get("type") if tag == "script" else None
        if self.open:
            self.scripts.setdefault(self.open, []).append("")

    def handle_data(self, data):
        if self.open:
            self.scripts[self.open][-1] += data
        else:
            self.texts.append(data)

    def handle_endtag(self, tag):
        self.open = None


@pytest.mark.parametrize("name", FIGURES)
def test_hostile_strings_are_text(pages, name):
    page = Page(pages[name].read_text())
    assert page.tags <= TAGS
    assert not any(attribute.startswith("on") for attribute in page.attributes)
    figures, (code,) = page.scripts.pop("application/json"), page.scripts.pop("module")
    assert not page.scripts
    assert len(figures) == FIGURES[name]
    assert not any("<" in figure for figure in figures)
    assert len(code) > 500_000
    assert (LABEL if name == "comparison" else HOSTILE) in "".join(page.texts)
    if name != "run":  # the figures of a run show only methods
        assert any(json.dumps(LABEL) in json.dumps(json.loads(figure)) for figure in figures)


@pytest.fixture(scope="module")
def browser():
    if shutil.which("chromium") is None:
        pytest.skip("no Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as browsers:
        opened = browsers.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.parametrize("name", FIGURES)
def test_pages_in_a_browser_on_a_phone(pages, browser, name):
    """Nothing hostile runs, nothing is logged, all figures are drawn and described, and no page scrolls sideways."""
    page = browser.new_page(viewport={"width": 390, "height": 800})
    messages = []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.goto(pages[name].as_uri())
    page.wait_for_function(f"document.querySelectorAll('.figure svg').length == {FIGURES[name]}", timeout=60_000)
    assert page.evaluate("document.images.length") == 0
    assert page.title() != "run"
    assert page.evaluate("document.querySelector('footer').innerText").startswith("spo_ray")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    if name == "run":
        told = page.evaluate(
            "[...document.querySelectorAll('.figure > div')].map(div => div.getAttribute('aria-label'))"
        )
        assert told[0].startswith("Greedy accuracy: base 16.7% (4.7% to 44.8%), sft 50.0% ")
        assert all(":" in text for text in told)
        for choice, words, shown in (("wrong:dpo", "", 2), ("right", "", 6), ("", "no such words", 0), ("", "", 12)):
            page.select_option("#filter", choice)
            page.fill("#search", words)
            assert page.locator(".sample:visible").count() == shown
            assert page.inner_text("#found") == f"{shown} shown"
    page.close()
    assert not messages


def test_a_thousand_generated_strings_stay_text_and_data_in_a_browser(tmp_path, browser):
    """As title, cells, attributes and data of a figure: the page has every one, and no other node or request."""
    rng = random.Random(0)
    texts = ["".join(rng.choices(PIECES, k=rng.randint(1, 8))) for _ in range(1000)]
    body = """{% extends "base.html.j2" %}{% from "macros.html.j2" import cell, figure %}
        {% block title %}{{ texts[0] }}{% endblock %}
        {% block body %}<table>{% for text in texts %}<tr title="{{ text }}">{{ cell(text) }}</tr>{% endfor %}</table>
        {{ figure(spec) }}{% endblock %}"""
    spec = {"mark": "point", "data": {"values": [{"text": text, "n": n % 9} for n, text in enumerate(texts)]}}
    spec["encoding"] = {"x": {"field": "n", "title": texts[1]}, "color": {"field": "text", "legend": None}}
    (tmp_path / "page.html").write_text(render(environment().from_string(body), texts=texts, spec=spec, versions={}))
    page = browser.new_page()
    asked, messages = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.goto((tmp_path / "page.html").as_uri())
    page.wait_for_function("document.querySelectorAll('.figure svg').length == 1", timeout=60_000)
    assert page.eval_on_selector_all("td", "all => all.map(cell => cell.textContent)") == texts
    assert page.eval_on_selector_all("tr", "all => all.map(row => row.title)") == texts
    data = "JSON.parse(document.querySelector('.figure script').textContent).data.values.map(row => row.text)"
    assert page.evaluate(data) == texts
    tags = page.evaluate("[...new Set([...document.querySelectorAll('*:not(svg, svg *)')].map(e => e.localName))]")
    assert set(tags) <= TAGS | {"tbody", "form"}  # Vega-Embed adds an empty form
    page.close()
    assert not messages
    assert asked == [(tmp_path / "page.html").as_uri()]
