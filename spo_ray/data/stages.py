"""Row-wise stages after sampling: score, choose the SFT set, pair. Free of torch: their tasks start in a moment."""

from functools import partial
from pathlib import Path

from spo_ray import rows
from spo_ray.config import PairsConfig, SftDataConfig
from spo_ray.core.pairs import correct_responses, wrong_against_sft
from spo_ray.core.scoring import extract, is_correct
from spo_ray.core.stats import pass_at_k
from spo_ray.run import Artifact, Ledger, Run, require_rows
from spo_ray.shards import Mapper, Row, RowRejectedError, each_row, map_shards

ROWS_PER_SHARD = 2000


def score(run: Run, name: str, samples: Artifact) -> Artifact:
    """Grade every sample against the gold answer (:class:`rows.Scored`); the manifest has the pass@k means."""

    def build(out: Path, ledger: Ledger) -> None:
        map_shards(name, samples, out, ledger, mapper=_grader, kind=rows.Scored, batch_size=ROWS_PER_SHARD)
        counts = [(len(row["correct"]), sum(row["correct"])) for row in Artifact(out, "").rows()]
        for k in (1, 2, 4, 8, 16, 32, 64):
            if counts and k <= min(n for n, _ in counts):
                ledger.facts[f"pass@{k}"] = sum(pass_at_k(n, c, k) for n, c in counts) / len(counts)

    return run.stage(name, build, config={}, inputs={"samples": samples})


def choose_sft_questions(run: Run, scored: Artifact) -> Artifact:
    """Questions with a low pass@k, each with its correct responses (:class:`rows.SftQuestion`)."""
    config = run.config.sft_data

    def build(out: Path, ledger: Ledger) -> None:
        map_shards(
            "sft_questions",
            scored,
            out,
            ledger,
            mapper=partial(_chooser, config),
            kind=rows.SftQuestion,
            batch_size=ROWS_PER_SHARD,
        )
        require_rows(Artifact(out, "").rows(), "questions for the SFT set (sft_data.max_pass, sft_data.teachers)")

    return run.stage("sft_questions", build, config=config.model_dump(), inputs={"scored": scored})


def make_pairs(run: Run, scored: Artifact) -> Artifact:
    """SFT responses against the policy's own wrong samples (:class:`rows.Pair`)."""
    config, seed = run.config.pairs, run.config.seed

    def build(out: Path, ledger: Ledger) -> None:
        map_shards(
            "pairs",
            scored,
            out,
            ledger,
            mapper=partial(_pairer, config, seed),
            kind=rows.Pair,
            batch_size=ROWS_PER_SHARD,
        )
        require_rows(Artifact(out, "").rows(), "preference pairs: no question has a wrong, finished sample")

    return run.stage("pairs", build, config=config.model_dump(), inputs={"scored": scored})


def _grader() -> Mapper:
    def grade(row: Row) -> list[Row]:
        extracted = [extract(text) for text in row["samples"]]
        return [row | {"extracted": extracted, "correct": [is_correct(e, row["gold"]) for e in extracted]}]

    return each_row(grade)


def _chooser(config: SftDataConfig) -> Mapper:
    def choose(row: Row) -> list[Row]:
        rate = pass_at_k(len(row["correct"]), sum(row["correct"]), config.pass_k)
        if rate > config.max_pass:
            raise RowRejectedError(f"pass@{config.pass_k} above {config.max_pass}")
        responses = correct_responses(
            row["gold"],
            row["samples"],
            row["correct"],
            row["finished"],
            teachers=config.teachers,
            limit=config.responses_per_question,
        )
        if not responses:
            raise RowRejectedError(f"no correct response from {', '.join(config.teachers)}")
        return [{"id": row["id"], "prompt": row["prompt"], "gold": row["gold"], "responses": responses}]

    return each_row(choose)


def _pairer(config: PairsConfig, seed: int) -> Mapper:
    def pair(row: Row) -> list[Row]:
        found = wrong_against_sft(
            row["responses"],
            row["samples"],
            row["correct"],
            row["finished"],
            per_question=config.per_question,
            seed=f"{seed}:{row['id']}",
        )
        if not found:
            raise RowRejectedError("no wrong sample that ends by itself")
        return [
            {"id": f"{row['id']}-{i}", "prompt": row["prompt"], "chosen": chosen, "rejected": rejected}
            for i, (chosen, rejected) in enumerate(found)
        ]

    return each_row(pair)
