"""Evaluates checkpoints with the configured suites, in parallel and during training where there is room."""

import json
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from spo_ray.config.evaluate import LM_EVAL
from spo_ray.evaluate import accuracy, alpaca, health, lm_eval
from spo_ray.evaluate.accuracy import by_item
from spo_ray.evaluate.actors import Actors
from spo_ray.evaluate.statistics import compare
from spo_ray.evaluate.suite import Suite, SuiteContext
from spo_ray.evaluate.win_rates import effective
from spo_ray.runtime import schema
from spo_ray.runtime.artifact import Artifact, RowCounts, write_rows
from spo_ray.runtime.cluster import room_beside
from spo_ray.runtime.console import log, warn
from spo_ray.runtime.map_rows import Row
from spo_ray.runtime.parallel import run_parallel
from spo_ray.runtime.run import Run, Stage, Work

SUITES = {"accuracy": accuracy.SUITE, "health": health.SUITE, "alpaca_eval": alpaca.SUITE}


class Evaluation(NamedTuple):
    """Results of an evaluation."""

    scores: Artifact
    """Rows of :class:`schema.Score`."""
    comparisons: Artifact
    """Rows of :class:`schema.Comparison`."""
    answers: dict[str, Artifact]
    """Rows of :class:`schema.EvalRow` by checkpoint; empty without the suite ``accuracy``."""


class Evaluations:
    """Evaluations of one run; a context manager that ends the evaluator processes."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.names = run.config.eval.chosen(run.config.data)
        self.suites: dict[str, Suite] = {name: suite_of(name) for name in self.names}
        self.actors = Actors(run.config.engine, run.config.model)
        self.measured: dict[tuple[str, str], Artifact] = {}
        self.background: threading.Thread | None = None

    def __enter__(self) -> "Evaluations":
        return self

    def __exit__(self, *error: Any) -> None:
        self.actors.end()

    def start(self, data: Artifact, checkpoints: Mapping[str, Artifact]) -> None:
        """Measure checkpoints in the background, if an engine has room beside every planned stage."""
        run = self.run
        if run.mode != "execute" or not run.config.eval.while_training:
            return
        node = room_beside(run.planned, run.config.engine)
        if node is None:
            return
        log("evaluate", f"measures {' and '.join(checkpoints)} while the next stages run")

        def work() -> None:
            try:
                for name, checkpoint in checkpoints.items():
                    self._measure(data, name, checkpoint, node)
            except Exception as error:  # finish tries again, and raises it if it lasts
                warn("evaluate", f"failed while other stages ran, and is tried again later: {error}")

        self.background = threading.Thread(target=work, daemon=True)
        self.background.start()

    def finish(self, data: Artifact, checkpoints: Mapping[str, Artifact]) -> Evaluation:
        """Measure what is left on the held-out rows ``data``, compare and score.

        Raises:
            ray.exceptions.RayError: an evaluator failed for good; what other checkpoints reached is kept.
        """
        while self.background is not None and self.background.is_alive():
            self.background.join(timeout=1.0)  # lets Ctrl-C through
        first = {name: c for name, c in checkpoints.items() if name == self.run.config.reference}
        for part in (first, {name: c for name, c in checkpoints.items() if name not in first}):
            calls: dict[str, Callable[[], None]] = {n: partial(self._measure, data, n, c) for n, c in part.items()}
            run_parallel(calls, self.actors.replicas if self.run.mode == "execute" else 1)
        concluded: dict[tuple[str, str], list[Artifact]] = {}
        for name, suite in self.suites.items():
            if suite.second_pass:
                measured = {checkpoint: self.measured[name, checkpoint] for checkpoint in checkpoints}
                with self.actors.lease() as evaluator:
                    context = SuiteContext(self.run, data, evaluator)
                    for checkpoint, artifacts in suite.second_pass(context, checkpoints, measured).items():
                        concluded[name, checkpoint] = artifacts
        self.actors.close()
        return self._collect(list(checkpoints), concluded)

    def _measure(self, data: Artifact, name: str, checkpoint: Artifact, node: str | None = None) -> None:
        with self.actors.lease(node) as evaluator:
            for suite in self.names:
                if (suite, name) not in self.measured:
                    compared = health.is_compared(self.run.config, name)
                    reference = self.measured.get((suite, self.run.config.reference)) if compared else None
                    context = SuiteContext(self.run, data, evaluator, reference)
                    self.measured[suite, name] = self.suites[suite].measure(context, name, checkpoint)

    def _collect(self, names: list[str], concluded: Mapping[tuple[str, str], list[Artifact]]) -> Evaluation:
        inputs = {f"{suite}_{name}": self.measured[suite, name] for suite in self.names for name in names}
        more = [(key, artifact) for key, artifacts in concluded.items() for artifact in artifacts]
        inputs |= {f"{suite}_{name}_{artifact.path.name}": artifact for (suite, name), artifact in more}
        alpaca_config = self.run.config.eval.alpaca if "alpaca_eval" in self.names else None
        settings = {"length_control": effective(alpaca_config.length_control)} if alpaca_config else {}

        def score(out: Path, counts: RowCounts) -> None:
            table = []
            for name in names:
                for suite in self.names:
                    table += self._scores(suite, name, concluded.get((suite, name), []))
            counts.read = counts.kept = len(table)
            write_rows(out / "part-0.parquet", table, schema.Score)

        def contrast(out: Path, counts: RowCounts) -> None:
            table = [row for metric, items in self._items(names, concluded).items() for row in compare(metric, items)]
            counts.read = counts.kept = len(table)
            write_rows(out / "part-0.parquet", table, schema.Comparison)

        scores = self.run.execute(Stage("scores", score, settings, inputs, Work(note="metrics with intervals")))
        comparisons = self.run.execute(Stage("comparisons", contrast, {}, inputs, Work(note="paired tests")))
        answers = {name: self.measured["accuracy", name] for name in names} if "accuracy" in self.names else {}
        return Evaluation(scores, comparisons, answers)

    def _scores(self, suite: str, name: str, concluded: list[Artifact]) -> list[Row]:
        measured = self.measured[suite, name]
        provenance = measured.manifest["facts"]["provenance"]
        provenance["sampling"] = json.dumps(provenance["sampling"])
        key = {"checkpoint": name, "suite": suite}
        metrics = self.suites[suite].metrics(self.run.config.eval, measured, concluded)
        return [key | m._asdict() | {"seeds": list(m.seeds), "provenance": provenance} for m in metrics]

    def _items(
        self, names: list[str], concluded: Mapping[tuple[str, str], list[Artifact]]
    ) -> dict[str, dict[str, dict[str, float]]]:
        """Return values by metric, checkpoint and item for the comparisons."""
        items: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
        for name in names if "accuracy" in self.names else []:
            for metric, values in by_item(self.measured["accuracy", name].rows()).items():
                items[metric][name] = values
        for (suite, name), artifacts in concluded.items():
            for row in (row for a in artifacts for row in a.rows() if suite == "alpaca_eval"):
                if row["preference"] is not None:
                    items[f"{row['annotator']}/win_rate"][name][row["id"]] = 100 * (row["preference"] - 1)
        return items


def suite_of(name: str) -> Suite:
    """Return a suite by its name in ``eval.suites``."""
    return lm_eval.suite(name.removeprefix(LM_EVAL)) if name.startswith(LM_EVAL) else SUITES[name]
