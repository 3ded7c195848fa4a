"""What a run would do: reasons for what is made again, and estimates against what they are made of."""

import json

import pytest
from transformers import AutoModelForCausalLM

from spo_ray.errors import UserError
from spo_ray.pipeline import estimate
from spo_ray.pipeline.job import stages as whole_job
from spo_ray.pipeline.outline import outline
from spo_ray.pipeline.plan import plan
from spo_ray.pipeline.rehearsal import rehearse
from spo_ray.runtime import schema
from spo_ray.runtime.artifact import write_rows
from spo_ray.runtime.console import installed
from spo_ray.runtime.run import Run

from ..helpers import small_config


def build(out, counts):
    counts.read = counts.kept = 1
    write_rows(out / "part-0.parquet", [{"id": "a", "prompt": "p", "gold": "g"}], schema.Prompt)


def job(run):
    """Two stages, of which the second reads what the first has written."""
    config = run.config
    first = run.stage("first", build, config={"samples": config.sampling.samples}, inputs={})
    yield "data"
    lr = {"train": {"lr": config.sft.lr}}
    second = run.stage("second", build, config=lr | {"teachers": config.sft_data.teachers}, inputs={"rows": first})
    yield "sft"
    run.stage("third", build, config={}, inputs={"model": second})
    yield "evaluate"
    raise AssertionError("the report needs results")


def finish(config):
    for part in job(Run(config)):
        if part == "evaluate":
            return


@pytest.fixture
def config(in_root, tmp_path):
    return small_config(tmp_path)


def test_a_rehearsal_says_what_a_run_then_does(config, capsys):
    assert rehearse(config, job).found["first"] == ("starts", "")
    assert not (config.output / config.name).exists()
    finish(config)
    again = rehearse(config, job)
    assert {state for name, (state, _) in again.found.items() if name != "report"} == {"reused"}
    for overrides, expected in {
        ("sft.lr=0.5",): {"second": "train.lr 0.0001 -> 0.5", "third": "its input second is another"},
        ("sampling.samples=2",): {
            "first": "samples 4 -> 2",
            "second": "its input first is another",
            "third": "its input second is another",
        },
        ("seed=5", "sft_data.teachers=[gold]"): {
            "first": "seed 0 -> 5",
            "second": 'seed 0 -> 5, teachers ["samples", "gold"] -> ["gold"], its input first is another',
            "third": "seed 0 -> 5, its input second is another",
        },
    }.items():
        changed = small_config(config.output, *overrides)
        found = {name: why for name, (_, why) in rehearse(changed, job).found.items() if why}
        assert found == expected
        capsys.readouterr()
        with installed():
            finish(changed)
        printed = capsys.readouterr().out
        assert [name for name in ("first", "second", "third") if f"{name}: starts" in printed] == list(expected)
        for name, why in expected.items():
            assert f"{name}: made again: {why}\n" in printed
        finish(config)


def test_a_plan_says_why_the_run_would_be_refused(in_root, tmp_path):
    text, problem = plan(small_config(tmp_path, "model.path=/absent/model"), whole_job)
    assert "no model in /absent/model" in problem
    assert "method_spo" in text


def test_estimates_against_what_they_are_made_of(config, toy_base):
    lines = {line.stage: line for line in outline(config)}
    own = estimate.Estimator(config)
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(toy_base).parameters())
    sft, spo, dpo = (own.of(lines[name]) for name in ("sft", "method_spo", "method_dpo"))
    assert lines["sft"].tokens == 48 * 2 * 256  # questions x responses x max_length, one epoch
    assert lines["base_samples"].tokens == 48 * 4 * 64
    assert lines["method_dpo"].tokens == 2 * 48 * 256
    assert sft.disk == 4 * parameters
    assert sft.while_it_runs == 3 * 12 * parameters  # two checkpoints are kept while the third is written
    assert dpo.disk > sft.disk  # phi
    assert sft.seconds == pytest.approx(6 * parameters * 48 * 2 * 256 / estimate.products_per_second())
    assert spo.seconds == pytest.approx(2.5 * dpo.seconds)
    assert not sft.measured
    manifest = {"rows": {"read": 48, "kept": 48}, "wall_s": 10.0}
    earlier = config.output / "earlier" / "sft"
    earlier.mkdir(parents=True)
    (earlier / "manifest.json").write_text(json.dumps(manifest))
    assert own.of(lines["sft"]).seconds == 20.0
    assert own.of(lines["sft"]).measured


def test_a_plan_for_a_hub_model_without_a_network_has_what_can_be_known(in_root, tmp_path):
    text, problem = plan(small_config(tmp_path, "model.path=some/model"), whole_job)
    assert problem
    assert "sft   " in text
    with pytest.raises(UserError):
        from spo_ray.pipeline.cli import show_plan

        show_plan(small_config(tmp_path, "model.path=some/model"), whole_job)
