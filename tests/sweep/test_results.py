"""Rows, ranking, what is kept, estimates and importances, from trials' folders that are written here."""

import csv
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from spo_ray.config.load import load
from spo_ray.report.figures import svg
from spo_ray.report.sweep import sensitivity_figures, write_sweep_report
from spo_ray.report.sweep_figures import (
    estimates,
    heat_figure,
    importance_figure,
    importances,
    parallel_figure,
    sensitivity_figure,
)
from spo_ray.runtime.run import Run, Stage, never_built
from spo_ray.sweep.results import ROW, Progress, close_trials, prune, rank, row_of, rows_of, write_best, write_csv
from spo_ray.sweep.trial import SCORES, TRAINING, TRIAL

from .test_space import LAMBDA, TOY, space

BETA = "methods.spo.base.beta"
WIDE = [
    space(
        methods__spo__lambda_sft="{type: loguniform, low: 0.01, high: 100}",
        methods__spo__base__beta="{type: choice, values: [0.1, 0.5]}",
    ),
    "sweep.searcher=random",
    "sweep.seeds=[0, 1]",
]


def trial(folder, number, values, seed=0, *, accuracy=None, share=1.0, fall=0.0, stopped=None):
    """A trial's folder as a trial leaves it."""
    own = folder / f"{number:05d}"
    (own / TRAINING).mkdir(parents=True)
    (own / TRIAL).write_text(json.dumps({"number": number, "values": values, "seed": seed, "trial_id": str(number)}))
    if accuracy is not None:
        entry = {"value": accuracy, "low": accuracy - 0.1, "high": accuracy + 0.1, "n": 100}
        record = {"accuracy_greedy": entry, "accuracy_sampled": entry, "delta_logp_chosen": {"value": -fall}}
        record |= {"step": round(100 * share), "share": share, "seconds": 7.5, "values": values, "stopped": stopped}
        (own / SCORES).write_text(json.dumps(record) + "\n")
    if share == 1.0:
        (own / TRAINING / "model.safetensors").write_bytes(b"0" * 1000)
        (own / TRAINING / "tokenizer").mkdir()
    (own / TRAINING / "log.jsonl").write_text("{}\n")
    return own


def rows_in(folder, sweep, failed=()):
    given = {"number": None, "values": {}, "seed": 0}
    return [row_of(path, sweep, given, path.name in failed, "KeyError: x") for path in sorted(folder.iterdir())]


@pytest.fixture
def sweep():
    return load(TOY, WIDE).sweep


@pytest.fixture
def five(tmp_path, sweep):
    """Two points of which both seeds finished, one with one seed stopped, one collapsed, one failed."""
    a, b, c = {LAMBDA: 1.0, BETA: 0.1}, {LAMBDA: 2.0, BETA: 0.1}, {LAMBDA: 3.0, BETA: 0.5}
    trial(tmp_path, 0, a, 0, accuracy=0.6)
    trial(tmp_path, 1, a, 1, accuracy=0.7)
    trial(tmp_path, 2, b, 0, accuracy=0.9)
    trial(tmp_path, 3, b, 1, accuracy=0.5)
    trial(tmp_path, 4, c, 0, accuracy=0.95)
    trial(tmp_path, 5, c, 1, accuracy=0.4, share=0.25)
    trial(tmp_path, 6, {LAMBDA: 0.1, BETA: 0.5}, 0, accuracy=0.3, share=0.5, fall=4.0, stopped="collapse: log pi fell")
    trial(tmp_path, 7, {LAMBDA: 0.2, BETA: 0.5}, 0, share=0.0)
    return tmp_path


def test_every_trial_has_a_row_with_what_became_of_it(five, sweep, tmp_path):
    rows = rows_in(five, sweep, failed=["00007"])
    assert [row["status"] for row in rows] == ["finished"] * 5 + ["stopped", "stopped", "failed"]
    assert rows[5]["reason"] == "asha: not in the best 1/2 at 25% of the steps"
    assert rows[6]["reason"].startswith("collapse")
    assert rows[7]["reason"] == "KeyError: x"
    for row in rows:
        row["bytes"] = 1
    write_csv(tmp_path / "results.csv", rows, sweep)
    with (tmp_path / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(line["accuracy_greedy"]) for line in table[:5]] == [0.6, 0.7, 0.9, 0.5, 0.95]
    assert (table[0]["accuracy_greedy_low"], table[0]["accuracy_greedy_high"]) == ("0.5", "0.7")
    assert (table[6][LAMBDA], table[6]["steps"], table[6]["status"]) == ("0.1", "50", "stopped")
    assert table[7]["accuracy_greedy"] == ""


def test_the_best_point_is_the_one_with_most_finished_seeds_then_the_best_mean(five, sweep):
    ranked = rank(rows_in(five, sweep), sweep)
    assert [point.values[LAMBDA] for point in ranked[:3]] == [2.0, 1.0, 3.0]
    assert ranked[0].means[0] == pytest.approx(0.7)
    assert [row["trial"] for row in ranked[2].rows] == ["00004"]


def test_equal_means_are_told_apart_by_the_other_objectives_and_a_minus_turns_them_round(tmp_path):
    more = "sweep.objectives=[accuracy_greedy, {}delta_logp_chosen]"
    for number, fall in enumerate([1.0, 0.5]):
        trial(tmp_path, number, {LAMBDA: float(number)}, accuracy=0.5, fall=fall)
    for sign, expected in (("", 1.0), ("-", 0.0)):
        sweep = load(TOY, [*WIDE, more.format(sign)]).sweep
        assert rank(rows_in(tmp_path, sweep), sweep)[0].values[LAMBDA] == expected


def test_only_the_best_checkpoints_are_kept(five, sweep):
    rows = rows_in(five, sweep)
    prune(five, rows, rank(rows, sweep)[:1])
    kept = sorted(path.parts[-3] for path in five.glob(f"*/{TRAINING}/model.safetensors"))
    assert kept == ["00002", "00003"]
    assert all((five / f"{i:05d}" / TRAINING / "log.jsonl").exists() for i in range(7))
    assert not (five / "00000" / TRAINING / "tokenizer").exists()


def test_intervals_are_students_over_seeds_and_the_scores_own_for_one(five, sweep):
    found = {point.values[LAMBDA]: point for point in estimates(rows_in(five, sweep), "accuracy_greedy")}
    scores = np.array([0.6, 0.7])
    low, high = stats.t.interval(0.95, 1, scores.mean(), stats.sem(scores))
    assert (found[1.0].low, found[1.0].high) == (pytest.approx(low), pytest.approx(high))
    assert (found[0.1].low, found[0.1].high) == (pytest.approx(0.2), pytest.approx(0.4))
    assert (found[1.0].finished, found[3.0].finished, found[0.1].finished) == (True, False, False)


def test_importances_name_the_parameter_that_matters(tmp_path, sweep):
    rng = np.random.default_rng(0)
    for number in range(60):
        values = {LAMBDA: float(10 ** rng.uniform(-2, 2)), BETA: float(rng.choice([0.1, 0.5]))}
        trial(tmp_path, number, values, accuracy=0.5 + 0.1 * math.log10(values[LAMBDA]) + 0.01 * rng.normal())
    found = importances(rows_in(tmp_path, sweep), sweep)
    assert sum(found.values()) == pytest.approx(1.0)
    assert found[LAMBDA] > 0.9
    assert importances(rows_in(tmp_path, sweep)[:3], sweep) == {}


def test_figures_have_every_point(five, sweep):
    rows = [row for row in rows_in(five, sweep) if row["scores"]]
    figure = svg(sensitivity_figure(rows, LAMBDA, sweep))
    assert figure.startswith("<svg")
    assert figure.count('aria-roledescription="point"') == len(estimates(rows, "accuracy_greedy"))
    heat = svg(heat_figure(rows, LAMBDA, BETA, sweep))
    assert ">0.650<" in heat  # the mean of 0.6 and 0.7
    lines = svg(parallel_figure(rows, sweep))
    assert lines.count('aria-roledescription="line mark"') == len(rows)
    assert svg(importance_figure({LAMBDA: 0.75, BETA: 0.25})).count('aria-roledescription="bar"') == 2


@pytest.fixture
def equal(tmp_path, sweep):
    """A point that was tried twice with seed 0, the first time in vain, and one with both seeds."""
    a, b = {LAMBDA: 1.0, BETA: 0.1}, {LAMBDA: 2.0, BETA: 0.1}
    trial(tmp_path, 0, a, 0, accuracy=0.1, share=0.25)
    trial(tmp_path, 1, a, 0, accuracy=0.9)
    trial(tmp_path, 2, a, 0, accuracy=0.8)
    trial(tmp_path, 3, b, 0, accuracy=0.5)
    trial(tmp_path, 4, b, 1, accuracy=0.5)
    return tmp_path


def test_of_equal_trials_one_counts(equal, sweep):
    rows = rows_in(equal, sweep)
    ranked = rank(rows, sweep)
    assert [(point.values[LAMBDA], point.finished) for point in ranked] == [(2.0, 2), (1.0, 1)]
    assert [row["trial"] for row in ranked[1].rows] == ["00001"]
    found = {point.values[LAMBDA]: point for point in estimates(rows, "accuracy_greedy")}
    assert (found[1.0].mean, found[1.0].seeds, found[1.0].finished) == (0.9, 1, True)
    assert (found[1.0].low, found[1.0].high) == pytest.approx((0.8, 1.0))


def test_a_point_is_decided_when_all_its_seeds_have_ended_however_often_one_was_tried(equal, sweep):
    """Both points are tried with seed 0 twice before seed 1 ends, which makes the first the best."""
    a = {LAMBDA: 1.0, BETA: 0.1}
    trial(equal, 5, a, 1, accuracy=0.9)
    points = [json.loads((equal / f"{i:05d}" / TRIAL).read_text()) for i in range(6)]
    trials = [TuneTrial(config={"point": point}, trial_id=str(i), status="") for i, point in enumerate(points)]
    progress, kept = Progress(equal, sweep), []
    for number in (0, 3, 4, 2, 1, 5):
        progress.on_trial_complete(1, trials, trials[number])
        trials[number].status = "TERMINATED"
        kept.append(sorted(int(path.parts[-3]) for path in equal.glob(f"*/{TRAINING}/model.safetensors")))
    assert kept == [[1, 2, 3, 4, 5]] * 5 + [[1, 5]]


class TuneTrial(SimpleNamespace):
    """What Ray Tune hands to its callbacks."""

    __hash__ = object.__hash__


class Ended(list):
    """Ray Tune's results, of which so many have ended."""

    def __init__(self, results, terminated, errors=0):
        super().__init__(results)
        self.num_terminated, self.num_errors = terminated, errors


def result_of(number, values, seed=0, error=None):
    point = {"number": number, "values": values, "seed": seed}
    return SimpleNamespace(config={"point": point}, path=f"tune/{number:05d}", error=error)


def closing(tmp_path, *overrides):
    """A sweep whose trials' folders are to be put into the stage's."""
    run = Run(load(TOY, [*WIDE, f"output={tmp_path / 'runs'}", *overrides]))
    stage = run.open(Stage("trials", never_built, config={}, inputs={}))
    return run, stage


def test_a_sweep_is_not_closed_while_trials_are_under_way(tmp_path):
    run, stage = closing(tmp_path, "sweep.samples=2", "sweep.seeds=[0]")
    results = [result_of(i, {LAMBDA: float(i), BETA: 0.1}) for i in range(2)]
    for i, result in enumerate(results):
        trial(stage.scratch, i, result.config["point"]["values"], accuracy=0.5)
    for known, ended, errors in ((results, 1, 0), (results[:1], 1, 0), (results, 0, 1)):
        with pytest.raises(
            RuntimeError, match=r"interrupted: 1 of 2 trials have ended; .*same command runs the others"
        ):
            close_trials(run, stage, Ended(known, ended, errors))
    assert not list(stage.scratch.glob(f"*/{ROW}"))
    assert len(close_trials(run, stage, Ended(results, 1, 1))) == 2


def test_what_is_said_to_have_its_checkpoint_has_it(tmp_path):
    run, stage = closing(tmp_path, "sweep.keep=2", "sweep.samples=3", "sweep.seeds=[0]")
    results = [result_of(i, {LAMBDA: float(i), BETA: 0.1}) for i in range(3)]
    for i, result in enumerate(results):
        trial(stage.scratch, i, result.config["point"]["values"], accuracy=0.9 - 0.1 * i)
    (stage.scratch / "00001" / TRAINING / "model.safetensors").unlink()
    rows = close_trials(run, stage, Ended(results, 3))
    assert [row["checkpoint"] for row in rows] == [True, False, False]
    assert [path.parts[-3] for path in stage.scratch.glob(f"*/{TRAINING}/model.safetensors")] == ["00000"]


def test_a_trial_that_failed_before_it_wrote_anything_is_a_row_with_its_values(tmp_path, sweep):
    """It is the first: the table's columns and the figures are those of the search space all the same."""
    run, stage = closing(tmp_path, "sweep.samples=3", "sweep.seeds=[0]")
    results = [result_of(0, {LAMBDA: 7.0, BETA: 0.1}, error=RuntimeError("no room"))]
    results += [result_of(i, {LAMBDA: float(i), BETA: 0.5}) for i in (1, 2)]
    for result in results[1:]:
        point = result.config["point"]
        trial(stage.scratch, point["number"], point["values"], accuracy=0.5)
    rows = close_trials(run, stage, Ended(results, 2, 1))
    assert (rows[0]["values"], rows[0]["seed"], rows[0]["status"]) == ({LAMBDA: 7.0, BETA: 0.1}, 0, "failed")
    rows[0]["values"] = {}
    write_csv(tmp_path / "results.csv", rows, sweep)
    with (tmp_path / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [line[LAMBDA] for line in table] == ["", "1.0", "2.0"]
    figures = sensitivity_figures(rows, sweep, {})
    assert all(svg(chart).startswith("<svg") for _, chart in figures)


def test_figures_of_a_score_with_slashes_are_files_in_the_report(tmp_path):
    objective = "health/greedy/repetition_4"
    overrides = ["eval.suites=[accuracy, health]", f"sweep.objectives=[-{objective}]", "sweep.seeds=[0]"]
    run, stage = closing(tmp_path, *overrides, "sweep.samples=2")
    results = [result_of(i, {LAMBDA: float(i + 1), BETA: 0.1}) for i in range(2)]
    for i, result in enumerate(results):
        folder = trial(stage.scratch, i, result.config["point"]["values"], accuracy=0.5)
        record = json.loads((folder / SCORES).read_text())
        (folder / SCORES).write_text(json.dumps(record | {objective: {"value": 0.1 * i}}) + "\n")
    close_trials(run, stage, Ended(results, 2))
    trials = run.close(stage)
    write_sweep_report(run, trials, rank(rows_of(trials), run.config.sweep)[0])
    names = {path.name for path in (run.root / "report").glob("*.svg")}
    assert names == {
        "health_greedy_repetition_4_against_lambda_sft.svg",
        "health_greedy_repetition_4_against_beta.svg",
        "lambda_sft_x_beta.svg",
        "parallel_coordinates.svg",
    }
    drawn = (run.root / "report" / "parallel_coordinates.svg").read_text()
    assert drawn.count('aria-roledescription="line mark"') == 2


def test_the_best_configuration_is_ready_to_run(five, tmp_path):
    config = load(TOY, [*WIDE, f"output={tmp_path}"])
    run = Run(config)
    run.root.mkdir()
    best = rank(rows_in(five, config.sweep), config.sweep)[0]
    written = load(write_best(run, best))
    assert written.methods["spo"].lambda_sft == 2.0
    assert (written.name, written.sweep) == ("sweep-toy-best", None)
    assert written.preference == config.preference
