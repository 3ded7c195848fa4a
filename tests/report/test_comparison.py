"""`spo-ray report` on small made-up folders: one run's page anew, several runs compared."""

import csv
import json
import os
import re
import shutil
from html import unescape

import pytest

from spo_ray import __version__
from spo_ray.evaluate.statistics import holm, mcnemar, wilson
from spo_ray.pipeline import cli

from .conftest import RIGHTS
from .made_up import made_up_sweep


def report(*arguments):
    return int(cli.app(["report", *map(str, arguments)], exit_on_error=False, result_action="return_value") or 0)


def text_of(page):
    """A page without its code, its figures, its tags and its line breaks."""
    own = page.partition('<script type="module">')[0]
    return " ".join(unescape(re.sub(r"<script.*?</script>|<style.*?</style>|<[^>]+>", "|", own, flags=re.S)).split())


@pytest.fixture(scope="module")
def compared(folder):
    assert report(folder / "a", folder / "b", folder / "c", folder / "s") == 0
    return (folder / "report-comparison" / "index.html").read_text()


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder / "a", tmp_path / "a")


def test_one_run_gets_its_page_again(copy, capsys):
    assert report(copy) == 0
    page = (copy / "report" / "index.html").read_text()
    assert f">{100 * RIGHTS['dpo'] / 12:.1f}%" in page
    (copy / "report" / "index.html").write_text("an older one")
    assert report(copy) == 0
    assert (copy / "report" / "index.html").read_text() == page
    assert "report: reused" not in capsys.readouterr().out
    assert json.loads((copy / "summary.json").read_text())["methods"]["spo"]["accuracy_greedy"]["value"] == 1


def test_a_run_that_was_moved_is_written_where_it_is(folder, copy):
    before = sorted(path.name for path in folder.iterdir())
    assert report(copy) == 0
    assert sorted(path.name for path in folder.iterdir()) == before
    assert not (folder / "a" / "report").exists()


def test_figures_lead_to_rows_that_are_there(copy):
    assert report(copy) == 0
    page = (copy / "report" / "index.html").read_text()
    targets = re.findall(r'<a href="([^"]+)"', page.partition('<script type="module">')[0])
    assert len(targets) > 20
    assert all((copy / "report" / target).exists() for target in targets)
    for name in ("base", "sft", "dpo", "spo"):
        greedy = f'<a href="../eval_{name}/part-0.parquet">{RIGHTS[name] / 12:.1%}<small> ('
        assert greedy in page


def test_what_models_wrote_is_escaped(copy, compared):
    assert report(copy) == 0
    page = (copy / "report" / "index.html").read_text()
    assert "&lt;script&gt;alert" in page or "script</mark>" in page
    for written in (page, compared):
        assert not re.search(r"<script>alert|<b>excerpt", written)


def test_every_run_and_checkpoint_has_a_line(compared):
    lines = re.findall(r"<tr>(<td.*?)</tr>", compared)
    cells = [[re.sub("<[^>]+>", "", cell) for cell in re.findall(r"<td.*?</td>", line)] for line in lines]
    results = {(line[0], line[1]): line[2:] for line in cells if len(line) == 7 and line[0] in "abcs"}
    assert len(results) == 3 * 4 + 2
    assert results["a", "spo"][0].startswith("100.0% (")
    assert results["b", "spo"][0].startswith("8.3% (")
    assert results["s", "trial_00003"][0].startswith("91.7% (")
    assert results["b", "dpo"][2:4] == ["-2.00", "-4.00"]
    assert compared.count('<td class="fell">') == 3  # dpo's chosen answers, in three runs


def test_paired_tests_of_the_same_method_on_the_same_questions(compared):
    text = text_of(compared)
    table = re.findall(
        r"([abs]/\w+) − ([abs]/\w+)\|+([+-][\d.e+-]+)\|+[^|]+\|+(\d+) : (\d+)\|+([\d.e-]+)\|+([\d.e-]+)", text
    )
    greedy = table[: len(table) // 2]
    pairs = {
        ("a/dpo", "b/dpo"): (0, 1),
        ("a/spo", "b/spo"): (11, 0),
        ("a/spo", "s/trial_00003"): (1, 0),
        ("b/spo", "s/trial_00003"): (0, 10),
    }  # base and sft are the same checkpoints, with the same answers
    assert {(one, other): (int(wins), int(losses)) for one, other, _, wins, losses, *_ in greedy} == pairs
    p_values = [mcnemar(*pairs[one, other]) for one, other, *_ in greedy]
    assert [row[5] for row in greedy] == [f"{p:.2g}" for p in p_values]
    assert [row[6] for row in greedy] == [f"{p:.2g}" for p in holm(p_values)]
    assert "a/spo is better than b/spo; s/trial_00003 is better than b/spo." in text
    assert "different settings, whose effect the tests can't separate: eval.max_tokens" in text


def test_runs_with_other_questions_are_not_tested(compared):
    text = text_of(compared)
    for pair in ("a and c", "b and c", "c and s"):
        reason = "their held-out questions differ: 12 and 12, 12 ids in common, of which 0 have the same"
        assert f"{pair}: no paired test is possible, {reason}" in text
    assert "c/spo −" not in text


def test_only_settings_that_differ_are_listed(compared):
    listed = compared.partition("Settings that differ")[2]
    lines = dict(re.findall(r"<tr><td>([\w.]+)</td>(.*?)</tr>", listed))
    values = re.findall("<td>(.*?)</td>", lines["methods.spo.lambda_sft"])
    assert values == ["1.0", "7.0", "1.0", "30.0"]  # the sweep's: its best point's
    assert re.findall("<td>(.*?)</td>", lines["seed"]) == ["0", "0", "5", "0"]
    assert "data.type" not in lines
    assert not any(key.startswith(("name", "output", "sweep")) for key in lines)


def test_curves_are_overlaid_by_run(compared):
    specs = [json.loads(found) for found in re.findall(r'<script type="application/json">(.*?)</script>', compared)]
    records = specs[0]["data"]["values"]
    last = {(r["method"], r["series"], r["side"]): r["value"] for r in records if r["step"] == 6}
    assert last["spo", "a", "chosen"] == last["spo", "s", "chosen"] == 1
    assert last["dpo", "b", "chosen"] == -2
    assert last["dpo", "c", "rejected"] == -4
    assert ("dpo", "s", "chosen") not in last
    points = next(spec for spec in specs if "against" not in str(spec) and "lambda_sft" in str(spec))["data"]["values"]
    assert [(p["x"], round(p["mean"], 6)) for p in points] == [(0.01, 0.5), (0.1, 0.6), (1.0, 0.7), (30.0, 0.8)]


def test_a_page_of_its_own_for_a_sweep(folder, tmp_path):
    sweep = shutil.copytree(folder / "s", tmp_path / "s")
    assert report(sweep) == 0
    assert "lambda_sft = 30" in text_of((sweep / "report" / "index.html").read_text())
    assert (
        json.loads((sweep / "summary.json").read_text())["test"]["trial_00003"]["accuracy_greedy"]["value"] == 11 / 12
    )


def test_a_sweep_of_which_nothing_finished(in_root, folder, tmp_path):
    sweep = made_up_sweep(tmp_path, "lost", 0, finish=False)
    assert report(folder / "a", sweep, "--out", tmp_path / "here.html") == 0
    text = text_of((tmp_path / "here.html").read_text())
    assert "lost is a sweep of spo: no trial finished, so nothing was measured. Best at the last score: " in text
    assert "a and lost: no paired test is possible, lost has no graded answers" in text


def test_out_is_a_folder_or_a_file(folder, tmp_path):
    assert report(folder / "a", folder / "b", "--out", tmp_path / "some where") == 0
    page = (tmp_path / "some where" / "index.html").read_text()
    targets = re.findall(r'<a href="([^"]+)"', page)
    assert targets
    assert all((tmp_path / "some where" / target).exists() for target in targets)


def remove(name):
    return lambda run: shutil.rmtree(run / name)


def change(name, **values):
    def work(run):
        file = run / name / "manifest.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return work


def replace(name, make):
    def work(run):
        (run / name).unlink()
        make(run / name)

    return work


def lead_out(run):
    (run.parent / "outside").mkdir()
    (run.parent / "outside" / "part-0.parquet").write_text("not to be read")
    (run / "eval_dpo" / "part-0.parquet").unlink()
    (run / "eval_dpo" / "part-0.parquet").symlink_to(run.parent / "outside" / "part-0.parquet")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (remove("method_spo"), "is not finished, it has no stage method_spo"),
        (remove("scores"), "is not finished, it has no stage scores"),
        (remove("eval_dpo"), "is not finished"),
        (change("method_dpo", digest="another"), "is not finished, eval_dpo is older than what it was made from"),
        (change("eval_spo", digest="another"), "is not finished, scores is older than what it was made from"),
        (change("pairs", stage="../../elsewhere"), "is the manifest of '../../elsewhere': it is not read"),
        (lead_out, "leads out of the run's folder"),
        (lambda run: (run / "sft" / "manifest.json").write_text("{"), "can't be read"),
        (
            lambda run: (run / "pairs" / "part-0.parquet").write_text(""),
            "is not finished, pairs/part-0.parquet has 0 bytes, not ",
        ),
        (lambda run: (run / "config.json").write_text("[" * 9999), "config.json can't be read"),
        (replace("method_spo/result.json", lambda file: file.symlink_to(file)), "method_spo/result.json can't be read"),
        (replace("scores/manifest.json", os.mkfifo), "scores/manifest.json can't be read (it is no file)"),
        (replace("scores/manifest.json", lambda file: file.symlink_to("/dev/zero")), "can't be read (it is no file)"),
        (lambda run: (run / "config.json").unlink(), "is no run's folder: it has no config.json"),
        (lambda run: (run / "config.json").write_text("{}"), "is no configuration of this version"),
        (shutil.rmtree, "no folder"),
    ],
)
def test_a_run_that_can_not_be_used_is_one_clear_error(copy, capsys, harm, message):
    harm(copy)
    assert report(copy) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert message in errors
    assert "Traceback" not in errors
    assert not (copy / "report").exists()


def test_a_trial_of_another_folder_is_refused(folder, tmp_path, capsys):
    sweep = shutil.copytree(folder / "s", tmp_path / "s")
    file = sweep / "trials" / "00003" / "row.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"trial": "../../../a/method_spo"}))
    assert report(folder / "a", sweep) == 2
    assert "leads out of its folder" in capsys.readouterr().err
    file.write_text("{")
    assert report(folder / "a", sweep) == 2
    assert "row.json can't be read (JSONDecodeError): run the sweep again" in capsys.readouterr().err


def test_usage(folder, tmp_path, capsys):
    for arguments, message in (
        ((), "name the folder of a finished run"),
        ((folder / "a", folder / "b" / ".." / "a"), "a run is named twice"),
        ((folder / "a", "--out", tmp_path), "--out is for a comparison"),
    ):
        assert report(*arguments) == 2
        assert message in capsys.readouterr().err


def test_runs_of_the_same_name_are_told_apart(folder, copy, tmp_path):
    assert report(folder / "a", copy, "--out", tmp_path) == 0
    text = text_of((tmp_path / "index.html").read_text())
    assert f"{copy.parent.name}/a" in text
    assert f"{folder.name}/a" in text
    assert "None." in text.partition("Settings that differ")[2]


def test_results_as_markdown_and_csv(folder, capsys):
    assert report(folder / "a", folder / "s", "--markdown") == 0
    *told, table = capsys.readouterr().out.split("\n\n")
    assert told[1].startswith(f"**s**: Made with spo_ray {__version__} on ")
    assert told[0].startswith(
        "**a**: No method is shown to be better than the SFT model, which solves 50.0% of the 12 "
    )
    lines = [line.split(" | ") for line in table.strip().strip("|").splitlines()]
    assert [line[:3] for line in lines[:1] + lines[-1:]] == [
        [" run", "method", "greedy, 95%"],
        ["| s", "trial_00003", "91.7% (64.6 – 98.5)"],
    ]
    assert {len(line) for line in lines} == {7}
    assert report(folder / "a", "--csv") == 0
    scores = {(row["checkpoint"], row["metric"]): row for row in csv.DictReader(capsys.readouterr().out.splitlines())}
    dpo = scores["dpo", "accuracy_greedy"]
    assert (dpo["run"], float(dpo["value"]), dpo["n"]) == ("a", 4 / 12, "12")
    assert (float(dpo["low"]), float(dpo["high"])) == pytest.approx(wilson(4, 12))


def test_more_samples_and_the_browser(copy, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)  # tests have no browser of a user's
    assert report(copy, "--samples", 3, "--open") == 0
    page = copy / "report" / "index.html"
    assert opened == [page.as_uri()]
    assert page.read_text().count("<details class=sample") == 3
    assert "Greedy answers to 3 of 12 held-out prompts" in text_of(page.read_text())
