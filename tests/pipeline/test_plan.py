"""Plans: what a run then does, why it would be refused, estimates, and upper bounds against real runs."""

import json

import pytest
from transformers import AutoModelForCausalLM

from spo_ray.errors import UserError
from spo_ray.pipeline.cli import show_plan
from spo_ray.pipeline.job import plan_job
from spo_ray.pipeline.plan import Estimator, plan_text, products_per_second
from spo_ray.runtime import schema
from spo_ray.runtime.artifact import write_rows
from spo_ray.runtime.console import installed
from spo_ray.runtime.run import PlannedRun, Run, Stage, Work

from ..helpers import small_config


def build(out, counts):
    counts.read = counts.kept = 1
    write_rows(out / "part-0.parquet", [{"id": "a", "prompt": "p", "gold": "g"}], schema.Prompt)


def job(run):
    """Three stages, of which each reads what the one before has written."""
    config = run.config
    first = run.execute(Stage("first", build, {"samples": config.sampling.samples}, work=Work(out=7)))
    settings = {"train": {"lr": config.sft.lr}, "teachers": config.sft_data.teachers}
    second = run.execute(Stage("second", build, settings, {"rows": first}, Work(first.max_rows)))
    run.execute(Stage("third", build, {}, {"model": second}, Work(second.max_rows)))
    return run


@pytest.fixture
def config(in_root, tmp_path):
    return small_config(tmp_path)


def test_a_plan_says_what_a_run_then_does(config, capsys):
    assert next((s.name, s.state, s.why) for s in job(PlannedRun(config)).planned) == ("first", "build", "")
    assert not (config.output / config.name).exists()
    job(Run(config))
    assert {stage.state for stage in job(PlannedRun(config)).planned} == {"reused"}
    for overrides, expected in {
        ("sft.lr=0.5",): {"second": "train.lr 0.0001 -> 0.5", "third": "input changed: second"},
        ("sampling.samples=2",): {
            "first": "samples 4 -> 2",
            "second": "input changed: first",
            "third": "input changed: second",
        },
        ("seed=5", "sft_data.teachers=[gold]"): {
            "first": "seed 0 -> 5",
            "second": 'seed 0 -> 5, teachers ["samples", "gold"] -> ["gold"], input changed: first',
            "third": "seed 0 -> 5, input changed: second",
        },
    }.items():
        changed = small_config(config.output, *overrides)
        assert {stage.name: stage.why for stage in job(PlannedRun(changed)).planned if stage.why} == expected
        capsys.readouterr()
        with installed():
            job(Run(changed))
        printed = capsys.readouterr().out
        assert [name for name in ("first", "second", "third") if f"{name}: build" in printed] == list(expected)
        for name, why in expected.items():
            assert f"{name}: built again: {why}\n" in printed
        job(Run(config))


def test_bounds_flow_from_stage_to_stage_and_are_counts_where_rows_are_there(config):
    assert [stage.work.rows for stage in job(PlannedRun(config)).planned] == [None, 7, 7]
    job(Run(config))
    assert [stage.work.rows for stage in job(PlannedRun(config)).planned] == [None, 1, 1]


def test_a_plan_says_why_the_run_would_be_refused(in_root, tmp_path):
    plan = plan_job(small_config(tmp_path, "model.path=/absent/model"))
    assert "no model in /absent/model" in plan.problem
    assert "method_spo" in plan_text(plan)


def test_estimates_against_what_they_are_made_of(config, toy_base):
    stages = {stage.name: stage for stage in plan_job(config).planned}
    own = Estimator(config)
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(toy_base).parameters())
    sft, spo, dpo = (own.of(stages[name]) for name in ("sft", "method_spo", "method_dpo"))
    assert stages["sft"].work.tokens == 48 * 2 * 256  # questions x responses x max_length, one epoch
    assert stages["base_samples"].work.tokens == 48 * 4 * 64
    assert stages["method_dpo"].work.tokens == 2 * 48 * 256
    assert sft.disk == 4 * parameters
    assert sft.checkpoints == 3 * 12 * parameters  # two checkpoints are kept while the third is written
    assert dpo.disk > sft.disk  # phi
    assert sft.seconds == pytest.approx(6 * parameters * 48 * 2 * 256 / products_per_second())
    assert spo.seconds == pytest.approx(2.5 * dpo.seconds)
    assert not sft.measured
    for name, text in (("earlier", json.dumps({"rows": {"read": 48, "kept": 48}, "wall_s": 10.0})), ("broken", "")):
        folder = config.output / name / "sft"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(text)
    assert own.of(stages["sft"]).seconds == 20.0
    assert own.of(stages["sft"]).measured


def test_a_plan_for_a_hub_model_without_a_network_has_what_can_be_known(in_root, tmp_path):
    plan = plan_job(small_config(tmp_path, "model.path=some/model"))
    assert plan.problem
    assert "sft   " in plan_text(plan)
    with pytest.raises(UserError):
        show_plan(plan)
