import json
import re
from html import unescape

from hypothesis import given
from hypothesis import strategies as st

from spo_ray.report import html
from spo_ray.report.figures import _smoothed, batch_figure, ratio_figure

EVIL = "<script>alert('x')</script>\"&"


def test_what_a_model_writes_is_never_code():
    table = html.table([EVIL, "b"], [[EVIL, EVIL]], words=1, change=EVIL)
    pieces = [table, html.details(EVIL, ""), html.note(EVIL), html.link(EVIL, EVIL), html.marked(EVIL, "other")]
    assert not re.search(r"<script|alert\('x'\)<", "".join(pieces))
    figure = html.figure({"title": EVIL})
    assert figure.count("</script>") == 1
    assert json.loads(re.search(r">(\{.*\})<", figure).group(1))["title"] == EVIL


@given(st.text(), st.text())
def test_marking_differences_changes_no_text(value, other):
    marked = html.marked(value, other)
    assert unescape(re.sub(r"</?mark>", "", marked)) == unescape(value) or "&" in value
    if value == other:
        assert "<mark>" not in marked


def test_words_that_differ_are_marked():
    assert html.marked("2 + 3 = 6.", "2 + 3 = 5.") == "2 + 3 = <mark>6</mark>."


def test_signs_have_colours_where_asked():
    assert html.table(["m", "change"], [["a", "-1"], ["b", "+1"]], change="change").count('class="fell"') == 1


def test_curves_are_smoothed_by_method_and_side():
    values = [("a", "x", 1.0), ("b", "x", 5.0), ("a", "x", 2.0), ("a", "x", 2.0)]
    records = [{"method": m, "series": s, "value": v} for m, s, v in values]
    assert [round(r["value"], 6) for r in _smoothed(records)] == [1.0, 5.0, 1.1, 1.19]


def test_a_step_without_finite_log_probabilities_is_left_out_of_the_curves(tmp_path):
    keys = ("logps/chosen", "logps/rejected", "probe/logps/chosen", "probe/logps/rejected")
    steps = [dict.fromkeys(keys, value) | {"step": step} for step, value in enumerate([-1.0, None, -2.0])]
    steps[0]["probe/logps/rejected"] = None
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    drawn = batch_figure({"dpo": tmp_path})["data"]["values"]
    assert [(r["step"], r["series"]) for r in drawn] == [(s, side) for s in (0, 2) for side in ("chosen", "rejected")]
    assert [r["step"] for r in ratio_figure({"dpo": tmp_path})["data"]["values"]] == [2]
