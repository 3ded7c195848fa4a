"""The whole job, in order: data, sampling, SFT, pairs, reference log-probabilities, training, evaluation, report.

The same functions run a job, plan it or read its results, depending on the kind of :class:`Run`. Every stage has a
folder of its own and is reused as long as everything that it depends on stays the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from spo_ray.config.schema import Config
from spo_ray.config.sweep import ValidationConfig
from spo_ray.data.filter import clean_pairs, hold_out, without_displacement
from spo_ray.data.pairs import preference_pairs
from spo_ray.data.sft_set import sft_set
from spo_ray.data.sources import load_data, load_examples
from spo_ray.data.tokenize import tokenise_pairs, tokenise_sft
from spo_ray.errors import UserError
from spo_ray.evaluate.evaluations import Evaluation, Evaluations
from spo_ray.model.adapter import ModelSource
from spo_ray.pipeline import Part
from spo_ray.pipeline.checks import preflight
from spo_ray.pipeline.plan import expected_of, range_text
from spo_ray.report.run_page import write_report
from spo_ray.report.summary import UNMEASURED, Finished
from spo_ray.runtime import schema
from spo_ray.runtime.artifact import Artifact, external
from spo_ray.runtime.cluster import connect
from spo_ray.runtime.console import log
from spo_ray.runtime.run import PlannedRun, Run, Stage, Work
from spo_ray.train.launch import train_methods, train_sft
from spo_ray.train.reference import reference_logps
from spo_ray.train.spec import Prepared, Start


@dataclass
class Job(Prepared):
    """The results of a job."""

    methods: dict[str, Artifact] = field(default_factory=dict)
    """Trained checkpoints by method."""
    evaluation: Evaluation = UNMEASURED
    """Metrics and comparisons."""


def run_job(run: Run, until: Part = "report") -> Job:
    """Run the job up to a part, and return its results so far.

    Raises:
        UserError: the job can't run as configured, or the cluster is too small for it.
    """
    if run.mode == "execute":
        plan = plan_job(run.config, until, verify=run.verify)
        if plan.problem:
            raise UserError(plan.problem)
        run.planned, run.expected = plan.planned, expected_of(plan)
        left = sum(stage.state != "reused" for stage in plan.planned)
        log("plan", f"{left} of {len(plan.planned)} stages to build, which takes {range_text(run.expected)}")
    job = Job(run.config)
    for part in parts(run, job):
        if part == until:
            break
    return job


def plan_job(config: Config, until: Part = "report", *, verify: bool = False) -> PlannedRun:
    """Return the plan of a job; if the job would be refused, ``problem`` of the plan has the reason."""
    plan = PlannedRun(config, verify=verify)
    with plan.noting_problems():
        preflight(config)
    with plan.noting_problems():
        run_job(plan, until)
    return plan


def parts(run: Run, job: Job) -> Iterator[Part]:
    """Execute the job and yield the name of each finished part; the caller may stop there."""
    config = run.config
    with Evaluations(run) as evaluations:
        for part in prepare(run, job):
            yield part
            if part == "data" and run.mode == "execute":
                connect(config, run.planned)
            if part == "sft":
                evaluations.start(job.test, job.untrained)

        first = Start(job.policy, job.reference)
        job.methods = train_methods(run, dict.fromkeys(config.methods, first), job.held_out)
        for number in range(2, config.rounds + 1):
            job.methods = next_round(run, job.methods, job.chosen, number)
        yield "train"

        job.evaluation = evaluations.finish(job.test, job.untrained | job.methods)
        yield "evaluate"

        write_report(Finished(run, job.methods, job.evaluation, job.test, job.pairs))
        yield "report"


def prepare(run: Run, job: Prepared, validation: ValidationConfig | None = None) -> Iterator[Part]:
    """Execute the job up to the reference log-probabilities; yield the name of each finished part.

    ``validation`` keeps questions or pairs out of training.
    """
    config, has_pairs = run.config, run.config.data.type == "preference"
    job.test = load_data(run, "test")
    rows = load_data(run, "train", against=job.test)
    yield "data"

    job.base = base_model(run)
    if validation and not has_pairs:
        rows, job.validation = hold_out(run, rows, "questions", validation.questions, schema.Prompt)
    job.chosen = clean_pairs(run, "pairs", rows) if has_pairs else sft_set(run, job.base, rows)
    held_out = job.test if has_pairs else None
    if validation and has_pairs:  # before SFT, which learns the chosen responses
        job.chosen, held_out = hold_out(run, job.chosen, "pairs", validation.pairs, schema.Pair)
        job.validation = held_out
    held_out_tokens = pair_tokens = None
    if has_pairs and held_out is not None:  # before SFT, so that pairs of which none can be used are refused at once
        held_out_tokens = tokenise_pairs(run, "held_out_tokens", held_out)
        pair_tokens = tokenise_pairs(run, "pair_tokens", job.chosen)
    yield "sample"

    job.policy = job.base
    if config.sft:
        examples = load_examples(run, config.sft.data, job.test) if config.sft.data else job.chosen
        job.policy = train_sft(run, job.base, tokenise_sft(run, examples))
    yield "sft"

    job.pairs = job.chosen if has_pairs else preference_pairs(run, job.policy, job.chosen)
    if validation and validation.pairs and not has_pairs:
        job.pairs, held_out = hold_out(run, job.pairs, "pairs", validation.pairs, schema.Pair)
    yield "pairs"

    if held_out is not None:
        held_out_tokens = held_out_tokens or tokenise_pairs(run, "held_out_tokens", held_out)
        job.held_out = reference_logps(run, "held_out_pairs", job.policy, held_out_tokens)
    pair_tokens = pair_tokens or tokenise_pairs(run, "pair_tokens", job.pairs)
    job.reference = without_displacement(run, reference_logps(run, "reference", job.policy, pair_tokens))
    yield "reference"


def base_model(run: Run) -> Artifact:
    """Return the configuration's model; if an adapter is to be merged into it, a stage with the result."""
    source = ModelSource.of(run.config.model)
    if source.adapter is None:
        return external(source.model)
    inputs = {"model": external(source.model), "adapter": external(source.adapter)}
    work = Work(cpus=1, note=f"{source.adapter.name} merged into {Path(source.model).name}")
    return run.execute(Stage("base_model", lambda out, _: source.merge(out), {}, inputs, work))


def next_round(run: Run, policies: dict[str, Artifact], chosen: Artifact, number: int) -> dict[str, Artifact]:
    """Train every method once more, from its last checkpoint on pairs with wrong samples of that checkpoint."""
    starts = {}
    for name, policy in policies.items():
        suffix = f"_{name}_round{number}"
        pairs = preference_pairs(run, policy, chosen, suffix)
        reference = referenced(run, policy, pairs, f"pair_tokens{suffix}", f"reference{suffix}")
        starts[name] = Start(policy, without_displacement(run, reference))
    return train_methods(run, starts, suffix=f"_round{number}")


def referenced(run: Run, policy: Artifact, pairs: Artifact, tokens: str, name: str) -> Artifact:
    """Tokenise pairs and add their log-probabilities under the policy before training."""
    return reference_logps(run, name, policy, tokenise_pairs(run, tokens, pairs))
