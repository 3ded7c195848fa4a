"""What trials share, done once: data, the SFT checkpoint, pairs with reference log-probabilities."""

import copy
import hashlib
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spo_ray import rows
from spo_ray.data.clean import clean_pairs
from spo_ray.data.recipe import preference_pairs, sft_set
from spo_ray.data.sources import load_data
from spo_ray.data.tokens import tokenise_pairs, tokenise_sft
from spo_ray.errors import UserError
from spo_ray.run import Artifact, Ledger, Run, external, write_rows
from spo_ray.sweep.space import sweep_of
from spo_ray.sweep_config import with_values
from spo_ray.train.launch import train_sft
from spo_ray.train.reference import reference_logps

OWN = ("methods.", "preference.", "model.lora_rank", "model.lora_alpha", "model.lora_targets")
"""Keys that matter to a trial's own training alone."""


@dataclass(frozen=True)
class Shared:
    """Where trials start."""

    config: Any
    """The configuration that it was made with."""
    sft: Artifact
    pairs: Artifact
    """Training pairs with reference log-probabilities."""
    held_out: Artifact | None
    """Such pairs for ``held_out_reward_accuracy``."""
    validation: Artifact
    """Rows for the suites: questions, for preference data pairs."""
    test: Artifact


def shared_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of a trial's values, those that its start depends on."""
    return {key: value for key, value in values.items() if not key.startswith(OWN)}


def run_for(run: Run, values: Mapping[str, Any]) -> Run:
    """The run whose stages a trial starts from: the sweep's own, or one in its folder ``shared``."""
    differing = shared_values(values)
    if not differing:
        return run
    other = copy.copy(run)
    other.config = with_values(run.config, differing)
    tag = hashlib.sha256(json.dumps(differing, sort_keys=True).encode()).hexdigest()[:8]
    other.root = run.root / "shared" / tag
    return other


def prepare(run: Run) -> Shared:
    """The job up to the reference log-probabilities, without the validation rows; finished stages are reused."""
    config = run.config
    sweep, has_pairs = sweep_of(config), config.data.type == "preference"
    test = load_data(run, "test")
    train = load_data(run, "train", against=test)
    held = held_out = validation = None
    if not has_pairs:
        train, validation = hold_out(run, train, "questions", sweep.validation.questions, rows.Prompt)
    base = external(config.model.path)
    chosen = clean_pairs(run, "pairs", train) if has_pairs else sft_set(run, base, train)
    if has_pairs:  # before SFT, which learns the chosen responses
        chosen, held_out = hold_out(run, chosen, "pairs", sweep.validation.pairs, rows.Pair)
    sft = train_sft(run, base, tokenise_sft(run, chosen))
    pairs = chosen if has_pairs else preference_pairs(run, sft, chosen)
    if not has_pairs and sweep.validation.pairs:
        pairs, held_out = hold_out(run, pairs, "pairs", sweep.validation.pairs, rows.Pair)
    scored = reference_logps(run, "reference", sft, tokenise_pairs(run, "pair_tokens", pairs))
    if held_out is not None:
        held = reference_logps(run, "held_out_pairs", sft, tokenise_pairs(run, "held_out_tokens", held_out))
    held_rows = validation or held_out
    assert held_rows is not None  # SweepConfig sees to that
    return Shared(config, sft, scored, held, held_rows, test)


def hold_out(run: Run, source: Artifact, what: str, count: int, kind: Any) -> tuple[Artifact, Artifact]:
    """(rows to train on, validation rows): a random part, drawn from the seed, with all rows of a prompt together.

    Raises:
        UserError: nothing would be left to train on.
    """
    table = source.rows()
    names: dict[str, str] = {}
    groups = [names.setdefault(json.dumps(row["prompt"]), row.get("source_id") or row["id"]) for row in table]
    different = sorted(set(groups))
    if count >= len(different):
        raise UserError(f"sweep.validation.{what}={count} leaves none of {len(different)} to train on: lower it")
    drawn = set(random.Random(f"validation-{run.config.seed}").sample(different, count))

    def part(name: str, inside: bool) -> Artifact:
        def build(out: Path, ledger: Ledger) -> None:
            kept = [row for row, group in zip(table, groups, strict=True) if (group in drawn) == inside]
            ledger.read, ledger.kept = len(table), len(kept)
            write_rows(out / "part-0.parquet", kept, kind)

        return run.stage(f"{name}_{what}", build, config={"count": count}, inputs={"source": source})

    return part("train", False), part("validation", True)
