"""Plans: what a run then does, why it would be refused, estimates, and upper bounds against real runs."""

import json
import re
from dataclasses import replace
from math import ceil
from shutil import copytree

import pytest
from transformers import AutoModelForCausalLM

from spo_ray.config.load import load
from spo_ray.data.sources import load_data
from spo_ray.errors import UserError
from spo_ray.model.tokenizer import ChatTokenizer
from spo_ray.pipeline import sweep_job
from spo_ray.pipeline.cli import show_plan
from spo_ray.pipeline.job import plan_job, run_job
from spo_ray.pipeline.plan import READING, Estimator, expected_seconds, plan_text, products_per_second, range_text
from spo_ray.pipeline.sweep_job import plan_sweep, run_sweep
from spo_ray.runtime import schema
from spo_ray.runtime.artifact import Artifact, external, write_json, write_rows
from spo_ray.runtime.console import installed
from spo_ray.runtime.run import PlannedRun, Run, Stage, Work, never_built
from spo_ray.sweep.results import ROW
from spo_ray.sweep.space import listed_points

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
        assert [name for name in ("first", "second", "third") if f"{name}: started" in printed] == list(expected)
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


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "[" * 10**5, "can't be used: maximum recursion depth exceeded"),
        ("config.json", {"vocab_size": "a"}, "can't be used: Validation error for field 'vocab_size'"),
        ("config.json", {"hidden_size": 0}, "can't be loaded: 0.0 cannot be raised to a negative power"),
        ("config.json", {"layer_types": ["x"]}, "can't be used: Class validation error for validator"),
        ("tokenizer.json", None, "has no vocabulary: tokenizer.json is missing, or can't be read"),
    ],
    ids=["depth", "type", "width", "layers", "vocabulary"],
)
def test_the_plan_of_a_broken_model_says_what_is_broken(in_root, toy_base, tmp_path, file, content, message):
    model = copytree(toy_base, tmp_path / "model")
    if content is None:
        (model / file).unlink()
        (model / file).mkdir()
    else:
        changed = content if isinstance(content, str) else json.dumps(json.loads((model / file).read_text()) | content)
        (model / file).write_text(changed)
    plan = plan_job(small_config(tmp_path, f"model.path={model}"))
    assert message in plan.problem
    assert str(model) in plan.problem
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
    assert sft.checkpoints == 0  # its 12 steps end before the first one, at step 100
    often = Estimator(small_config(config.output, "train.checkpoint.every=5"))
    assert often.of(stages["sft"]).checkpoints == 3 * 12 * parameters  # two are kept while the third is written
    assert dpo.disk > sft.disk  # phi
    assert sft.seconds == pytest.approx(6 * parameters * 48 * 2 * 256 / products_per_second() / READING)
    assert spo.seconds == pytest.approx(2.5 * dpo.seconds)
    assert not sft.measured
    for name, model, seconds in (("earlier", config.model.path, 10.0), ("newer", f"{toy_base}/../toy_base", 500.0)):
        changed = config.model_copy(update={"name": name, "model": config.model.model_copy(update={"path": model})})
        earlier = Run(changed)
        stage = earlier.open(Stage("sft", never_built, work=stages["sft"].work))
        stage.counts.read = 48
        earlier.close(stage, wall_s=seconds)  # the newer one is of another model
    for name, text in (("cut", '{"stage": "sft", "ro'), ("foreign", '{"rows": {"read": "x"}}'), ("deep", "[" * 9999)):
        folder = config.output / name / "sft"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(text)
    (config.output / "folder" / "sft" / "manifest.json").mkdir(parents=True)
    assert own.of(stages["sft"]).seconds == 20.0
    assert own.of(stages["sft"]).measured
    left = [(stages["sft"], own.of(stages["sft"])), (stages["method_dpo"], dpo)]
    expected = (20 * 0.8 + dpo.seconds * 0.3 + 2, 20 * 1.3 + dpo.seconds * 1.5 + 10)
    assert expected_seconds(left) == pytest.approx(expected)
    assert range_text((90.0, 7200.0)) == "1.5 min to 2.0 h"


def test_a_plan_ends_with_the_part_that_the_run_stops_after(config):
    assert plan_job(config, "sft").planned[-1].name == "sft"
    assert plan_job(config).planned[-1].name == "report"


def test_a_plan_for_a_hub_model_without_a_network_has_what_can_be_known(in_root, tmp_path):
    plan = plan_job(small_config(tmp_path, "model.path=some/model"))
    assert plan.problem
    assert "sft   " in plan_text(plan)
    with pytest.raises(UserError):
        show_plan(plan)


def test_the_bound_of_a_stage_that_was_cut_off_on_its_way_is_that_of_its_own_rows(config):
    run = Run(config)
    run.execute(Stage("first", build, {"old": True}))
    (run.root / "first").rename(run.root / "old")
    run.execute(Stage("first", lambda out, counts: None))
    (run.root / "first").rename(run.root / ".unfinished" / "first")
    (run.root / "old").rename(run.root / "first")
    found = PlannedRun(config).execute(Stage("first", build))
    assert (found.digest, found.max_rows) == (Run(config).execute(Stage("first", build)).digest, 0)


@pytest.mark.parametrize(("each", "held_out"), [(3, 4), (5, 3), (1, 7)])
def test_pairs_are_held_out_by_whole_prompts(in_root, tmp_path, each, held_out):
    (tmp_path / "data").mkdir()
    rows = [
        {"prompt": f"Question {i}?", "chosen": f"yes {j}", "rejected": "no"} for i in range(10) for j in range(each)
    ]
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"{{type: preference, path: {tmp_path}/data, held_out: from_train, test_pairs: {held_out}}}"
    config = load("configs/preferences.yaml", [f"output={tmp_path}", f"data={data}"])
    for split in ("train", "test"):
        assert load_data(PlannedRun(config), split).max_rows == load_data(Run(config), split).count


def test_tokens_are_counted_once_the_lengths_are_there(in_root, tmp_path, toy_base):
    """Before that they are those of a sample of the texts: here of all ten pairs, four of which are held out."""
    rows = [{"prompt": f"Question {i}?", "chosen": "yes " * (i + 1), "rejected": "no"} for i in range(10)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"data={{type: preference, path: {tmp_path}, held_out: from_train, test_pairs: 4}}"
    config = small_config(tmp_path, "sft=null", "eval.suites=[health]", data)
    plan = Captured(config)
    run_job(plan)
    chat = ChatTokenizer.load(toy_base, config.model)
    read = [2 * len(chat.prompt_ids(r["prompt"])) + len(chat.answer_ids(r["prompt"], r["rejected"])) for r in rows]
    read = [n + len(chat.answer_ids(r["prompt"], r["chosen"])) for n, r in zip(read, rows, strict=True)]
    expected = sum(read) / len(read)
    method = plan.stages["method_dpo"].work
    assert method.lengths == (pytest.approx(expected), True)
    assert method.tokens == ceil(6 * expected)
    assert f"~{method.tokens}" in tokens_of(plan, "method_dpo")

    def counted(out, counts):
        counts.facts["row_tokens"] = 50.0
        row = {"id": "a", "prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3], "template_differs": False}
        write_rows(out / "part-0.parquet", [row] * 5, schema.TokenisedPair)

    Run(config).execute(replace(plan.stages["pair_tokens"], build=counted))
    plan = Captured(config)
    run_job(plan)
    for stage in ("reference", "method_dpo"):
        assert (plan.stages[stage].work.tokens, plan.stages[stage].work.lengths) == (250, (50.0, False))
        assert tokens_of(plan, stage) == "250"


def tokens_of(plan, stage):
    (line,) = [line.split() for line in plan_text(plan).splitlines() if line.startswith(f"{stage} ")]
    return line[3]


QUESTIONS = """data_test data_train base_samples base_scores sft_questions reference_samples reference_scores
pair_candidates pairs pair_tokens reference method_dpo method_spo eval_reference health_reference eval_dpo health_dpo
eval_spo health_spo shift_dpo shift_spo scores comparisons report"""
PAIRS = """data_test data_train pairs held_out_tokens pair_tokens held_out_pairs reference method_dpo method_spo
health_reference health_dpo health_spo shift_dpo shift_spo scores comparisons report"""


@pytest.mark.parametrize("kind", ["questions", "pairs"])
def test_without_sft_methods_start_from_the_model_itself(in_root, tmp_path, kind):
    overrides = ["sft=null", "eval.suites=[health]"] if kind == "pairs" else ["sft=null"]
    if kind == "pairs":
        rows = [{"prompt": f"Question {i}?", "chosen": "yes", "rejected": "no"} for i in range(10)]
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        overrides.append(f"data={{type: preference, path: {tmp_path}, held_out: from_train, test_pairs: 4}}")
    config = small_config(tmp_path, *overrides)
    plan = Captured(config)
    job = run_job(plan)
    assert list(plan.stages) == (QUESTIONS if kind == "questions" else PAIRS).split()
    model = external(config.model.path).digest
    for name in ("reference", "method_dpo", "health_reference"):
        assert plan.stages[name].inputs["model"].digest == model
    assert plan.stages["shift_dpo"].inputs["reference"].digest == model
    assert list(job.untrained) == ["reference"]
    assert "method_spo" in plan_text(plan)


@pytest.mark.parametrize("data", ["{type: toy}", "{type: preference, path: FOLDER, test_pairs: 4}"])
def test_sft_trains_on_rows_of_its_own(in_root, tmp_path, data):
    rows = [{"prompt": f"Question {i}?", "chosen": "yes", "rejected": "no", "completion": "Yes."} for i in range(10)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [f"data={data.replace('FOLDER', str(tmp_path))}", "eval.suites=[health]"]
    plans = [
        Captured(small_config(tmp_path, *overrides, f"sft.data={source}"))
        for source in ("null", f"{{path: {tmp_path}/train.jsonl}}")
    ]
    for plan in plans:
        run_job(plan)
    order = list(plans[0].stages)  # ready pairs that can't be used are refused before SFT
    assert (order.index("pair_tokens") < order.index("sft")) == ("path" in data)
    first, second = (plan.stages["sft_tokens"].inputs["rows"] for plan in plans)
    assert (first.digest != second.digest, second.path.name) == (True, "sft_examples")
    assert [(s.work.rows, s.inputs["file"].path) for s in plans[1].stages.values() if s.name == "sft_examples"] == [
        (10, tmp_path / "train.jsonl")
    ]


def test_rounds_without_sft_go_on_from_each_methods_checkpoint(in_root, tmp_path):
    stages = [stage.name for stage in plan_job(small_config(tmp_path, "sft=null", "rounds=2")).planned]
    assert {"reference_samples", "dpo_round2_samples", "method_dpo_round2"} <= set(stages)
    assert not {"sft", "sft_tokens", "sft_samples", "eval_base"} & set(stages)


class Captured(PlannedRun):
    """A plan that keeps the stages."""

    def __init__(self, config):
        super().__init__(config)
        self.stages = {}

    def open(self, stage, **options):
        self.stages[stage.name] = stage
        return super().open(stage, **options)


BETA = "methods.spo.base.beta: {type: grid, values: [0.1]}"
SHARED = f"sweep.space={{sft.lr: {{type: grid, values: [1e-4, 3e-4, 1e-4]}}, {BETA}}}"
OWN = "sweep.space={sft.lr: {type: loguniform, low: 1e-4, high: 3e-4}}"


def sweep_config(output, space):
    searcher = "grid" if space == SHARED else "random"
    overrides = [space, f"sweep.searcher={searcher}", "sweep.samples=2", f"output={output}"]
    return load("configs/sweeps/toy.yaml", overrides)


def test_a_sweep_without_sft_starts_its_trials_from_the_model(in_root, tmp_path):
    config = load("configs/sweeps/toy.yaml", ["sft=null", f"output={tmp_path}"])
    plan = Captured(config)
    run_sweep(plan)
    assert "sft" not in plan.stages
    inputs = plan.stages["trials"].inputs
    assert set(inputs) == {f"0{name}" for name in ("reference", "pairs", "held_out", "validation")}
    assert inputs["0reference"].digest == external(config.model.path).digest


def test_a_sweeps_plan_has_each_shared_start_once_in_its_folder(in_root, tmp_path):
    plan = Captured(sweep_config(tmp_path, SHARED))
    run_sweep(plan)
    names = [stage.name for stage in plan.planned]
    assert len(names) == len(set(names))
    assert sum(bool(re.fullmatch(r"shared/[0-9a-f]{8}/sft", name)) for name in names) == 2
    assert names[-2:] == ["trials", "report"]
    inputs = {f"{start}{name}" for start in (0, 1) for name in ("sft", "pairs", "held_out", "validation")}
    assert set(plan.stages["trials"].inputs) == inputs


class Made(Run):
    """A run that makes every stage at once, empty, but for one finished trial."""

    def open(self, stage, **options):
        opened = super().open(stage, **options)
        if isinstance(opened, Artifact):
            return opened
        if stage.name == "trials":
            point = listed_points(self.config)[0]
            (opened.scratch / "00000").mkdir()
            scores = {"accuracy_greedy": {"value": 1.0}, "delta_logp_chosen": {"value": 0.0}}
            row = {"trial": "00000", "values": point["values"], "seed": 0, "status": "finished", "reason": ""}
            row |= {"steps": 1, "share": 1.0, "seconds": 0.0, "restarts": 0, "bytes": 0, "checkpoint": True}
            row["scores"] = scores
            write_json(opened.scratch / "00000" / ROW, row)
        return self.close(opened)


@pytest.mark.parametrize("space", [SHARED, OWN])
def test_a_sweep_joins_its_cluster_once_and_the_plan_of_a_finished_one_reuses_all(
    in_root, tmp_path, monkeypatch, space
):
    joined = []
    monkeypatch.setattr(sweep_job, "connect", lambda config, planned: joined.append(len(planned)))
    config = sweep_config(tmp_path, space)
    run_sweep(Made(config))
    assert len(joined) == 1
    plan = plan_sweep(config)
    assert plan.problem is None
    assert {stage.state for stage in plan.planned} == {"reused"}
    assert {"report", "scores", "eval_sft", "eval_trial_00000"} <= {stage.name for stage in plan.planned}
