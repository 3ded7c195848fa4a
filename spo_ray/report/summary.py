"""``summary.json``: what every method reached, from the stages' own files."""

import json
from pathlib import Path
from typing import Any

from spo_ray.core.stats import wilson
from spo_ray.evaluate.accuracy import accuracies
from spo_ray.run import Artifact, Run, versions
from spo_ray.train.job import RESULT

NO_CHANGE = {"delta_logp_chosen": None, "delta_logp_rejected": None}


def summarise(run: Run, methods: dict[str, Artifact], answers: dict[str, Artifact]) -> dict[str, Any]:
    """Accuracies by generation where there are questions, and the change of log-probabilities on the training pairs.

    For ready pairs without questions the accuracies are None, and ``held_out`` has the share of held-out pairs whose
    chosen response gained more than the rejected one.
    """
    table: dict[str, Any] = {}
    for name in ("base", "sft", *methods):
        entry = {"accuracy_greedy": None, "accuracy_sampled": None, **NO_CHANGE}
        if name in answers:
            entry |= accuracies(answers[name].rows())
        if name in methods:
            entry |= _log_probabilities(methods[name].path)
        table[name] = entry
    return {"run": run.config.name, "seed": run.config.seed, "methods": table, "versions": versions()}


def _log_probabilities(checkpoint: Path) -> dict[str, Any]:
    result = json.loads((checkpoint / RESULT).read_text())
    found = {key: result["train"][key] for key in NO_CHANGE} | {"pairs": result["train"]["n"], "steps": result["steps"]}
    if "held_out" in result:
        held_out = result["held_out"]
        n = held_out["n"]
        low, high = wilson(round(held_out["accuracy"] * n), n)
        found["held_out"] = {
            "reward_accuracy": {"value": held_out["accuracy"], "low": low, "high": high, "n": n},
            **{key: held_out[key] for key in NO_CHANGE},
        }
    return found
