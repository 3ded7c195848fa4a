"""Row-wise stages after sampling: grade, choose the SFT set, pair. Free of torch: their tasks start in a moment."""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from spo_ray import rows
from spo_ray.core.pairs import Sample, correct_responses, wrong_against_sft
from spo_ray.core.stats import pass_at_k
from spo_ray.data_config import PairsConfig, SftDataConfig, TeacherModel
from spo_ray.errors import RowRejectedError
from spo_ray.run import Artifact, Ledger, Run, require_rows
from spo_ray.shards import Mapper, Row, each_row, map_shards
from spo_ray.verifiers import load_verifier, verifier_identity, verifier_of

ROWS_PER_SHARD = 2000
ROUNDING = 1e-9  # 1 - 0.7 is more than 0.3


def score(run: Run, name: str, samples: Artifact) -> Artifact:
    """Grade samples without what ``sft_data.strip`` matches (:class:`rows.Scored`); the manifest has pass@k means."""
    verifier, strip = verifier_of(run.config.data), run.config.sft_data.strip

    def build(out: Path, ledger: Ledger) -> None:
        grader = partial(_grader, verifier, strip)
        map_shards(name, samples, out, ledger, mapper=grader, kind=rows.Scored, batch_size=ROWS_PER_SHARD)
        counts = [(len(correct), sum(correct)) for correct in Artifact(out, "").column("correct") if correct]
        for k in (1, 2, 4, 8, 16, 32, 64):
            if counts and k <= min(n for n, _ in counts):
                ledger.facts[f"pass@{k}"] = sum(pass_at_k(n, c, k) for n, c in counts) / len(counts)

    settings = {"verifier": verifier_identity(verifier), "strip": strip}
    return run.stage(name, build, config=settings, inputs={"samples": samples}, resumable=True)


def choose_sft_questions(run: Run, name: str, scored: Artifact, teachers: Sequence[str], last: bool) -> Artifact:
    """Questions with a low pass@k, with correct responses by the first teachers (:class:`rows.SftQuestion`)."""
    config = run.config.sft_data
    chosen = config.model_dump(include={"pass_k", "max_pass", "quantile"})
    limit = _highest_pass(config, scored)
    what = "questions for the SFT set (sft_data.max_pass, sft_data.teachers)"
    return _collect(run, name, scored, teachers, what, last, chosen, max_pass=limit)


def add_responses(run: Run, name: str, scored: Artifact, teachers: Sequence[str], last: bool) -> Artifact:
    """Correct responses of further teachers (:class:`rows.SftQuestion`); ``samples`` are those of the stage."""
    return _collect(run, name, scored, teachers, "questions with a correct response (sft_data.teachers)", last, {})


def _collect(
    run: Run,
    name: str,
    scored: Artifact,
    teachers: Sequence[str],
    what: str,
    last: bool,
    identity: dict[str, Any],
    max_pass: float | None = None,
) -> Artifact:
    config = run.config.sft_data
    stage = scored.path.name.replace("_scores", "_samples")

    def build(out: Path, ledger: Ledger) -> None:
        collector = partial(_collector, config, stage, list(teachers), last, max_pass)
        map_shards(name, scored, out, ledger, mapper=collector, kind=rows.SftQuestion, batch_size=ROWS_PER_SHARD)
        require_rows(Artifact(out, "").count, what)
        ledger.facts |= {} if max_pass is None else {"max_pass": max_pass}

    settings = identity | config.model_dump(include={"responses_per_question", "strip"}) | {"teachers": list(teachers)}
    inputs = {"scored": scored}
    return run.stage(name, build, config=settings | {"last": last}, inputs=inputs, resumable=True)


def _highest_pass(config: SftDataConfig, scored: Artifact) -> float:
    if config.quantile is None:
        return float(config.max_pass or 0.0)
    rates = sorted(pass_at_k(len(correct), sum(correct), config.pass_k) for correct in scored.column("correct"))
    return rates[max(0, round(config.quantile * len(rates)) - 1)] if rates else 0.0


def pair_samples(run: Run, name: str, scored: Artifact) -> Artifact:
    """SFT responses against the policy's own wrong samples (:class:`rows.Pair`)."""
    config, seed = run.config.pairs, run.config.seed
    stage = scored.path.name.replace("_scores", "_samples")

    def build(out: Path, ledger: Ledger) -> None:
        pairer = partial(_pairer, config, seed, stage)
        map_shards(name, scored, out, ledger, mapper=pairer, kind=rows.Pair, batch_size=ROWS_PER_SHARD)
        require_rows(Artifact(out, "").count, "preference pairs: no question has a wrong, finished sample", ledger)

    settings = config.model_dump(include={"per_question", "select"})
    return run.stage(name, build, config=settings, inputs={"scored": scored}, resumable=True)


def _stripped(text: str, patterns: Sequence[str]) -> str:
    for pattern in patterns:
        text = re.sub(pattern, "", text, flags=re.DOTALL)
    return text


def _grader(name: str, strip: Sequence[str]) -> Mapper:
    verifier = load_verifier(name)

    def grade(row: Row) -> list[Row]:
        texts = [_stripped(text, strip) for text in row["samples"]]
        grades = [verifier.grade(text, row["gold"]) for text in texts]
        columns = zip(*grades, strict=True) if grades else ((), (), ())
        named = dict(zip(("extracted", "correct", "strict"), map(list, columns), strict=True))
        return [row | {"samples": texts} | named]

    return each_row(grade)


def _samples(row: Row) -> list[Sample]:
    columns = (row[key] for key in ("samples", "sample_logps", "correct", "finished"))
    return [Sample(i, *values) for i, values in enumerate(zip(*columns, strict=True))]


def _collector(
    config: SftDataConfig, stage: str, teachers: Sequence[str], last: bool, max_pass: float | None
) -> Mapper:
    def collect(row: Row) -> list[Row]:
        if max_pass is not None:
            rate = pass_at_k(len(row["correct"]), sum(row["correct"]), config.pass_k)
            if rate > max_pass + ROUNDING:
                raise RowRejectedError(f"pass@{config.pass_k} above {max_pass:g}")
        found = correct_responses(
            list(zip(row["responses"], row["response_sources"], strict=True)),
            _stripped(row["gold"], config.strip),
            _samples(row),
            stage=stage,
            teachers=teachers,
            limit=config.responses_per_question,
        )
        if last and not found:
            names = [t.model if isinstance(t, TeacherModel) else t for t in config.teachers]
            raise RowRejectedError(f"no correct response from {', '.join(names)}")
        sides = {"responses": [text for text, _ in found], "response_sources": [source for _, source in found]}
        return [{key: row[key] for key in ("id", "prompt", "gold")} | sides]

    return each_row(collect)


def _pairer(config: PairsConfig, seed: int, stage: str) -> Mapper:
    def pair(row: Row) -> list[Row]:
        found = wrong_against_sft(
            row["responses"],
            _samples(row),
            select=config.select,
            per_question=config.per_question,
            seed=f"{seed}:{row['id']}",
        )
        if not found:
            raise RowRejectedError("no wrong sample that ends by itself")
        return [
            {
                "id": f"{row['id']}-{i}",
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "chosen": row["responses"][turn],
                "rejected": sample.text.strip(),
                "source_id": row["id"],
                "chosen_source": row["response_sources"][turn],
                "rejected_source": f"{stage}:{sample.index}",
            }
            for i, (turn, sample) in enumerate(found)
        ]

    return each_row(pair)
