"""Templates and their macros: what is escaped, marked and coloured."""

import json
import re
import subprocess
import sys
import zipfile
from html import unescape

from hypothesis import given
from hypothesis import strategies as st

from spo_ray.report.figures import MOST_PAIRS, _smoothed, batch_figure, ches_figure, log_probability_figure
from spo_ray.report.page import Link, Table, environment
from spo_ray.report.samples import differing
from spo_ray.report.scores import COLUMNS
from spo_ray.runtime import schema
from spo_ray.runtime.artifact import write_rows

from ..conftest import ROOT

EVIL = "<!--<script>alert('x')</script>\"&"


def laid_out(macros, **data):
    names = "cell, details, figure, link, note, table"
    return environment().from_string(f'{{% from "macros.html.j2" import {names} %}}{macros}').render(data)


def test_what_a_model_writes_is_never_code():
    table = Table([EVIL, "b"], [[EVIL, Link(EVIL, EVIL)]])
    macros = "{{ table(content, words=[1], signs=evil) }}{{ note(evil) }}{{ link(evil, evil) }}{{ cell(evil) }}"
    pieces = laid_out(macros + "{% call details(evil) %}{{ evil }}{% endcall %}", content=table, evil=EVIL)
    assert not re.search(r"<script|<!--|alert\('x'\)<", pieces)
    assert unescape(pieces).count(EVIL) == 10
    assert '"' not in "".join(re.findall(r'<a href="(.*?)">', pieces))


def test_a_figures_data_can_not_end_its_script():
    figure = laid_out("{{ figure(spec) }}", spec={"title": EVIL, "mark": "line", "data": [1, None]})
    (content,) = re.findall(r'<script type="application/json">(.*?)</script>', figure)
    assert "<" not in content
    assert list(json.loads(content).items()) == [("title", EVIL), ("mark", "line"), ("data", [1, None])]


@given(st.text(), st.text())
def test_marking_differences_changes_no_text(value, other):
    pieces = differing(value, other)
    assert "".join(piece for piece, _ in pieces) == value
    assert not any(differs for _, differs in differing(value, value))


def test_words_that_differ_are_marked():
    assert differing("2 + 3 = 6.", "2 + 3 = 5.") == [("2 + 3 = ", False), ("6", True), (".", False)]
    assert differing("2 + 3 = .", "2 + 3 = 5.") == [("2 + 3 = ", False), ("", True), (".", False)]


def test_signs_have_colours_where_asked():
    table = Table(["m", "change"], [["a", "-1"], ["-b", Link("+1", "rows")], ["c", ""]])
    found = laid_out('{{ table(content, signs="change") }}', content=table)
    assert re.findall('<td class="(.*?)">(.*?)</td>', found) == [("fell", "-1"), ("rose", '<a href="rows">+1</a>')]


def test_intervals_stand_in_a_line_of_their_own():
    cells = laid_out('{{ cell(value) }}{{ cell(value, "text") }}', value="5 (4 – 6)")
    assert re.findall("<td.*?</td>", cells) == ["<td>5<small> (4 – 6)</small></td>", '<td class="text">5 (4 – 6)</td>']


def test_explained_columns_are_columns_of_the_results():
    context = {"config": {"sft": None, "rounds": 1, "eval": {"temperature": 1}}, "reference": ""}
    explained = environment().get_template("explanations.j2").make_module(context).columns
    rejected = {name for name in COLUMNS if name.endswith("rejected")}  # explained with those of the chosen answers
    assert explained.keys() == COLUMNS.keys() - rejected


def test_the_wheel_has_the_templates(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    folder = "spo_ray/report/templates"
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).iterdir()}
    assert f"{folder}/base.html.j2" in files
    assert files <= set(zipfile.ZipFile(wheel).namelist())


def test_curves_are_smoothed_by_method_and_side():
    values = [("a", "x", 1.0), ("b", "x", 5.0), ("a", "x", 2.0), ("a", "x", 2.0)]
    records = [{"method": m, "series": s, "value": v, "step": 1} for m, s, v in values]
    assert [round(r["value"], 6) for r in _smoothed(records)] == [1.0, 5.0, 1.1, 1.19]


def test_a_step_without_finite_log_probabilities_is_left_out_of_the_curves(tmp_path):
    keys = ("logps/chosen_change", "logps/rejected_change", "probe/logps/chosen", "probe/logps/rejected")
    steps = [dict.fromkeys(keys, value) | {"step": step} for step, value in enumerate([-1.0, None, -2.0, -3.0])]
    steps[0]["probe/logps/rejected"] = None
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    drawn = batch_figure({"dpo": tmp_path})["data"]["values"]
    assert [(r["step"], r["series"]) for r in drawn] == [
        (s, side) for s in (0, 2, 3) for side in ("chosen", "rejected")
    ]
    changes = [r["value"] for r in log_probability_figure({"dpo": tmp_path})["data"]["values"]]
    assert changes == [0.0, -1.0, 0.0, -2.0, -1.0]  # the rejected answers are measured from step 2 on


def test_scores_of_pairs_stand_beside_what_training_did_to_them(tmp_path):
    n = 2 * MOST_PAIRS
    for method, sign in (("dpo", -1.0), ("spo", 1.0), ("nll", None)):
        rows = [{"id": str(i), "delta_logp_chosen": sign or 0.0, "delta_logp_rejected": 0.0} for i in range(n)]
        if sign:
            rows = [row | {"delta_logp_chosen": sign * i**3, "ches_per_token": i - 9.0} for i, row in enumerate(rows)]
        (tmp_path / method).mkdir()
        write_rows(tmp_path / method / "pairs.parquet", rows, schema.PairChange)
    drawn = ches_figure({method: tmp_path / method for method in ("dpo", "spo", "nll", "older")}, "ches_per_token")
    values = drawn["data"]["values"]
    assert [value for value in values if value["method"] == "dpo: rank correlation -1.00"][:2] == [
        {"method": "dpo: rank correlation -1.00", "score": -9.0, "value": 0.0},
        {"method": "dpo: rank correlation -1.00", "score": -7.0, "value": -8.0},
    ]
    assert len(values) == 2 * MOST_PAIRS
    assert drawn["description"].endswith("by CHES score; dpo: rank correlation -1.00; spo: rank correlation +1.00.")
    assert ches_figure({"nll": tmp_path / "nll"}, "ches") is None
