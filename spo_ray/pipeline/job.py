"""The whole job, in order: sampling, SFT, pairs, reference log-probabilities, training, evaluation, report."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from spo_ray.config.schema import Config
from spo_ray.data.filter import clean_pairs, hold_out
from spo_ray.data.pairs import preference_pairs
from spo_ray.data.sft_set import sft_set
from spo_ray.data.sources import load_data
from spo_ray.data.tokenize import tokenise_pairs, tokenise_sft
from spo_ray.errors import UserError
from spo_ray.evaluate.evaluations import Evaluations
from spo_ray.evaluate.statistics import in_words
from spo_ray.pipeline.checks import check_evaluation, preflight
from spo_ray.report.run_page import write_report
from spo_ray.runtime import schema
from spo_ray.runtime.artifact import Artifact, external, on_hub, write_json
from spo_ray.runtime.cluster import connect
from spo_ray.runtime.run import Run
from spo_ray.sweep.space import Shared, sweep_of
from spo_ray.train.launch import train_methods, train_sft
from spo_ray.train.reference import reference_logps
from spo_ray.train.spec import Start


def stages(run: Run) -> Iterator[str]:
    """The job; the name of each finished part is yielded, so that a caller can stop there."""
    config = run.config
    has_pairs = config.data.type == "preference"
    preflight(config)
    test = load_data(run, "test")
    train = load_data(run, "train", against=test)
    yield "data"

    if not run.only_rehearsed:
        connect(config)
    base = external(config.model.path)
    chosen = clean_pairs(run, "pairs", train) if has_pairs else sft_set(run, base, train)
    yield "sample"

    sft = train_sft(run, base, tokenise_sft(run, chosen))
    yield "sft"

    first_two = {"base": base, "sft": sft}
    with Evaluations(run, test) as evaluations:
        evaluations.start(first_two)
        held_out = referenced(run, sft, test, "held_out_tokens", "held_out_pairs") if has_pairs else None
        pairs = chosen if has_pairs else preference_pairs(run, sft, chosen)
        yield "pairs"

        first = Start(sft, referenced(run, sft, pairs, "pair_tokens", "reference"))
        yield "reference"

        methods = train_methods(run, dict.fromkeys(config.methods, first), held_out)
        for number in range(2, config.rounds + 1):
            methods = next_round(run, methods, chosen, number)
        yield "train"

        found = evaluations.finish(first_two | methods)
        yield "evaluate"

        write_report(run, methods, found, pairs, test)
        yield "report"


def next_round(run: Run, policies: dict[str, Artifact], chosen: Artifact, number: int) -> dict[str, Artifact]:
    """Every method goes on from its own last checkpoint, on pairs with that checkpoint's mistakes."""
    starts = {}
    for name, policy in policies.items():
        suffix = f"_{name}_round{number}"
        pairs = preference_pairs(run, policy, chosen, suffix)
        starts[name] = Start(policy, referenced(run, policy, pairs, f"pair_tokens{suffix}", f"reference{suffix}"))
    return train_methods(run, starts, suffix=f"_round{number}")


def referenced(run: Run, policy: Artifact, pairs: Artifact, tokens: str, name: str) -> Artifact:
    """Pairs as token ids, then with the policy's log-probabilities before it is trained on them."""
    return reference_logps(run, name, policy, tokenise_pairs(run, tokens, pairs))


def evaluate_apart(config: Config, checkpoints: Mapping[str, str]) -> None:
    """Measure checkpoints that were trained elsewhere, in a run of its own, and print their figures.

    Args:
        config: of the data, the engine and the suites.
        checkpoints: folders or hub ids by name; a folder may hold a PEFT adapter. One named ``sft`` is what the others'
            probabilities are compared with.

    Raises:
        UserError: a folder holds neither a model nor an adapter, or the data or the cluster can't be used.
    """
    from spo_ray.data.sources import load_data
    from spo_ray.model.export import adapted, is_adapter

    run = Run(config.model_copy(update={"name": f"{config.name}-evaluation"}))
    artifacts = {}
    for name, path in checkpoints.items():
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
            raise UserError(f"a checkpoint can't be called {name!r}: letters, digits, '.', '_' and '-' alone")
        if not on_hub(Path(path)) and not is_adapter(path) and not (Path(path) / "config.json").is_file():
            raise UserError(f"no model in {path} (neither config.json nor adapter_config.json there)")
        artifacts[name] = external(path)
        if is_adapter(path):
            below = external(adapted(Path(path)))
            digest = hashlib.sha256(f"{artifacts[name].digest} {below.digest}".encode()).hexdigest()
            artifacts[name] = Artifact(artifacts[name].path, digest)
    check_evaluation(config)
    with run.locked():
        data = load_data(run, "test")
        connect(config, training=False)
        with Evaluations(run, data) as evaluations:
            found = evaluations.finish(artifacts)
        table = found.scores.rows()
        write_json(run.root / "scores.json", {"scores": table, "comparisons": found.comparisons.rows()})
    for row in table:
        interval = "" if row["low"] is None else f"  ({row['low']:.4g} to {row['high']:.4g})"
        print(f"{row['checkpoint']:<12} {row['suite']}/{row['metric']:<28} {row['value']:.4g}{interval}")
    for row in found.comparisons.rows():
        print(f"{row['metric']}: {in_words(row)} (p {row['p_adjusted']:.2g})")


def prepare(run: Run) -> Shared:
    """The job up to the reference log-probabilities, without the validation rows; finished stages are reused."""
    config = run.config
    sweep, has_pairs = sweep_of(config), config.data.type == "preference"
    test = load_data(run, "test")
    train = load_data(run, "train", against=test)
    held = held_out = validation = None
    if not has_pairs:
        train, validation = hold_out(run, train, "questions", sweep.validation.questions, schema.Prompt)
    base = external(config.model.path)
    chosen = clean_pairs(run, "pairs", train) if has_pairs else sft_set(run, base, train)
    if has_pairs:  # before SFT, which learns the chosen responses
        chosen, held_out = hold_out(run, chosen, "pairs", sweep.validation.pairs, schema.Pair)
    sft = train_sft(run, base, tokenise_sft(run, chosen))
    pairs = chosen if has_pairs else preference_pairs(run, sft, chosen)
    if not has_pairs and sweep.validation.pairs:
        pairs, held_out = hold_out(run, pairs, "pairs", sweep.validation.pairs, schema.Pair)
    scored = reference_logps(run, "reference", sft, tokenise_pairs(run, "pair_tokens", pairs))
    if held_out is not None:
        held = reference_logps(run, "held_out_pairs", sft, tokenise_pairs(run, "held_out_tokens", held_out))
    held_rows = validation or held_out
    assert held_rows is not None  # SweepConfig sees to that
    return Shared(config, sft, scored, held, held_rows, test)
