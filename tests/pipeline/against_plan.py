"""A finished run beside the plan of the same job in an empty folder."""

import json
import re

import pytest

from spo_ray.pipeline.job import plan_job
from spo_ray.pipeline.sweep_job import plan_sweep
from spo_ray.runtime.artifact import Artifact
from spo_ray.runtime.run import Run

AFTER_TRIALS = re.compile(r"(eval|health|shift)_(sft|reference|trial_\d{5})|scores|comparisons")
"""Stages of a sweep that depend on which trial is the best."""


def check_against_plan(config, root, tmp_path, shared=False):
    """Planned stages are those of the run; planned rows and tokens are upper bounds of the real ones.

    Tokens by a sample of the texts may be a third too few, those of a plan in the run's own folder are the real ones. A
    ``shared`` folder also holds stages of other jobs.
    """
    fresh = config.model_copy(update={"output": tmp_path / "planned"})
    planned = (plan_sweep if config.sweep else plan_job)(fresh).planned
    made = {str(file.parent.relative_to(root)): json.loads(file.read_text()) for file in root.glob("**/manifest.json")}
    names = {stage.name for stage in planned}
    assert names <= made.keys()
    assert shared or all(name in names or (config.sweep and AFTER_TRIALS.fullmatch(name)) for name in made)
    for stage in planned:
        read, work = made[stage.name]["rows"]["read"], stage.work
        assert work.rows is None or read <= work.rows, (stage, read)
        room = 1.5 if work.lengths else 1.0
        assert work.tokens is None or tokens_of(Run(config), root, stage) <= room * work.tokens, stage
    for stage in [] if config.sweep else plan_job(config).planned:
        if stage.work.trains and not shared and "_round" not in stage.name:
            assert stage.work.tokens == pytest.approx(tokens_of(Run(config), root, stage), abs=1), stage


def tokens_of(run, root, stage):
    """Tokens that were generated (samples) or read (training), as far as files tell."""
    if stage.name.endswith("_samples"):
        return sum(map(sum, Artifact(root / stage.name, "").column("sample_tokens")))
    if not stage.work.trains or stage.name == "trials":
        return 0
    sft = stage.work.trains == "sft"
    source, sides = ("sft_tokens", ["completion"]) if sft else ("pair_tokens", ["chosen", "rejected"])
    epochs = run.config.sft.epochs if sft else run.config.preference.epochs
    rows = Artifact(root / source, "").rows()
    return epochs * sum(len(row["prompt_ids"]) + len(row[f"{side}_ids"]) for row in rows for side in sides)
