"""Suite ``alpaca_eval``: answers to instructions, judged against a baseline's answers."""

import json
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from spo_ray.config.data import EngineConfig
from spo_ray.config.evaluate import AlpacaConfig, AnnotatorConfig, EvalConfig
from spo_ray.data.sample import row_seed
from spo_ray.errors import UserError
from spo_ray.evaluate.actors import Actors, Pass
from spo_ray.evaluate.judge import Cache, Reply, Turns, ask_endpoint, fill, identity, read_reply, read_template
from spo_ray.evaluate.statistics import mean_interval
from spo_ray.evaluate.suite import Metric, Results, Suite, SuiteContext
from spo_ray.evaluate.win_rates import win_rates
from spo_ray.runtime import schema
from spo_ray.runtime.artifact import Artifact, RowCounts, external, on_hub, require_rows, write_json, write_rows
from spo_ray.runtime.cluster import engine_work
from spo_ray.runtime.console import log
from spo_ray.runtime.map_rows import Row
from spo_ray.runtime.run import Run, Stage, times

ANNOTATIONS = "annotations.json"
HUB_FILE = "alpaca_eval_gpt4_baseline.json"
UNPARSABLE = "unparsable verdict"
JUDGED_AT_ONCE = 64
"""Requests that a local judge answers before the replies are kept."""


def measure(bench: SuiteContext, name: str, checkpoint: Artifact) -> Artifact:
    """Answer the instructions (:class:`schema.Output`)."""
    config = _config(bench)
    settings = config.model_dump(include={"limit", "temperature", "max_tokens"})
    settings["batch_size"] = bench.run.config.eval.batch_size

    def build(out: Path, counts: RowCounts) -> None:
        table = read_instructions(config)
        asked = [(row["id"], row["instruction"]) for row in table]
        counts.facts |= bench.provenance(checkpoint, settings)
        seed = Pass(0 if config.temperature else None, config.temperature)
        limits = (config.max_tokens, bench.run.config.eval.batch_size)
        (answers,) = bench.call("answer", str(checkpoint.path), asked, [seed], *limits)
        kept = []
        for row, answer in zip(table, answers, strict=True):
            if isinstance(answer, str):
                counts.reject(row["id"], answer, row["instruction"])
            else:
                (text,) = answer.completions
                kept.append(row | {"checkpoint": name, "output": text.text.strip(), "finished": text.finished})
        counts.read, counts.kept = len(table), len(kept)
        require_rows(len(kept), f"instructions for alpaca_{name} that the engine can take", counts)
        write_rows(out / "part-0.parquet", kept, schema.Output)

    inputs = {"model": checkpoint, "instructions": external(config.instructions)}
    note = f"answers of up to {config.max_tokens} tokens"
    work = bench.work(note, rows=config.limit, tokens=times(config.limit, config.max_tokens))
    return bench.run.execute(Stage(f"alpaca_{name}", build, {**bench.identity, **settings}, inputs, work))


def conclude(bench: SuiteContext, checkpoints: Results, measured: Results) -> dict[str, list[Artifact]]:
    """Every annotator's view of every checkpoint (:class:`schema.Judgement`, and AlpacaEval's annotations.json)."""
    config = _config(bench)
    found: dict[str, list[Artifact]] = {name: [] for name in measured}
    failed: list[str] = []
    bench.actors.close()  # local judges take their place
    for annotator in config.annotators:
        template: Turns = [] if bench.run.mode == "read" else read_template(annotator)
        requests = 2 if annotator.orders == "both" else 1
        note, where = f"verdicts of {annotator.model}, {requests} requests each", "the engine of eval.alpaca.annotators"
        work = engine_work(annotator.engine, where, note, rows=config.limit)
        own = {"orders": annotator.orders, "template": template, "max_unjudged": config.max_unjudged}
        with _asker(annotator) as (ask, model):
            for name, outputs in measured.items():
                build = partial(_judge, bench, annotator, template, outputs, ask, model)
                settings = identity(annotator, model) | {"verdict": annotator.verdict} | own
                stage = f"judged_{name}@{annotator.name}"
                try:
                    found[name].append(bench.run.execute(Stage(stage, build, settings, {"outputs": outputs}, work)))
                except UserError as error:  # what others say is not lost
                    failed.append(str(error))
    if failed:
        raise UserError("\n".join(failed))
    return found


Ask = Callable[[Sequence[Turns], Callable[[int, Reply], None]], dict[int, str]]
"""Like :func:`spo_ray.evaluate.judge.ask_endpoint`."""


@contextmanager
def _asker(annotator: AnnotatorConfig) -> Generator[tuple[Ask, Artifact]]:
    """A way to ask an annotator, and its model."""
    if not isinstance(annotator.engine, EngineConfig):
        yield partial(ask_endpoint, annotator), Artifact(Path(annotator.model), annotator.model)
        return
    model, actors = external(annotator.model), Actors(annotator.engine, None)
    with actors.lease() as call:

        def ask(requests: Sequence[Turns], keep: Callable[[int, Reply], None]) -> dict[int, str]:
            failed = {}
            for start in range(0, len(requests), JUDGED_AT_ONCE):
                part = requests[start : start + JUDGED_AT_ONCE]
                for number, reply in enumerate(call("judge", str(model.path), part, annotator), start):
                    if isinstance(reply, str):
                        failed[number] = reply
                    else:
                        keep(number, reply)
            return failed

        try:
            yield ask, model
        finally:
            actors.close()


def _judge(
    bench: SuiteContext,
    annotator: AnnotatorConfig,
    template: Turns,
    outputs: Artifact,
    ask: Ask,
    model: Artifact,
    out: Path,
    counts: RowCounts,
) -> None:
    """Ask for every output what the cache does not know, and write the judgements."""
    table = outputs.rows()
    asked = [(row, first) for row in table for first in _orders(row, annotator) if not _same(row)]
    prompts = [_prompt(template, row, first) for row, first in asked]
    cache = Cache(bench.run.root.parent / ".judgements.sqlite")
    keys = [Cache.key(prompt=prompt, **identity(annotator, model)) for prompt in prompts]
    replies = {number: Reply(*said) for number, said in enumerate(map(cache.get, keys)) if said is not None}
    missing = [number for number in range(len(prompts)) if number not in replies]
    facts: Row = {"requests": len(missing), "cached": len(replies)}

    def keep(index: int, reply: Reply) -> None:
        replies[missing[index]] = reply
        if annotator.verdict != "weighted" or reply.logps:  # else there is nothing in it
            cache.put(keys[missing[index]], reply)

    log(f"judge {annotator.name}", f"{len(missing)} requests, {len(replies)} are known")
    failed = ask([prompts[number] for number in missing], keep) if missing else {}
    cache.close()
    reasons = {missing[index]: reason for index, reason in failed.items()}
    tokens = [sum(reply.tokens[side] for reply in replies.values()) for side in (0, 1)]
    facts |= {"prompt_tokens": tokens[0], "answer_tokens": tokens[1]}
    facts["with_logprobs"] = sum(reply.logps is not None for reply in replies.values())
    if annotator.price_per_million:
        facts["cost"] = sum(n * price / 1e6 for n, price in zip(tokens, annotator.price_per_million, strict=True))
    counts.facts |= facts | {"orders": annotator.orders}
    judged = list(_judgements(table, asked, replies, reasons, annotator))
    unjudged = [row for row in judged if row["preference"] is None]
    for row in unjudged:
        kind, _, detail = row["reason"].partition(": ")
        counts.reject(row["id"], kind, detail)
    if len(unjudged) / len(judged) > _config(bench).max_unjudged:
        raise _too_many(bench.run, annotator, table[0]["checkpoint"], unjudged, len(judged))
    counts.read, counts.kept = len(judged), len(judged) - len(unjudged)
    write_rows(out / "part-0.parquet", judged, schema.Judgement)
    write_json(out / ANNOTATIONS, [_record(row, j) for row, j in zip(table, judged, strict=True)])


def _too_many(run: Run, annotator: AnnotatorConfig, checkpoint: str, unjudged: list[Row], count: int) -> UserError:
    """The error, with all the reasons in a file."""
    file = run.root / f"unjudged_{checkpoint}@{annotator.name}.json"
    write_json(file, [{key: row[key] for key in ("id", "reason")} for row in unjudged])
    unclear = sum(row["reason"].startswith(UNPARSABLE) for row in unjudged)
    return UserError(
        f"annotator {annotator.name} left {len(unjudged)} of {count} outputs of {checkpoint} without a verdict "
        f"({len(unjudged) - unclear} failed requests, {unclear} unparsable answers; all of them in {file}), more than "
        "eval.alpaca.max_unjudged: the same command asks again where requests failed, and there alone"
    )


def _same(row: Row) -> bool:
    """Equal outputs are a draw, as in AlpacaEval; nobody is asked."""
    return row["output"] == row["baseline_output"]


def _orders(row: Row, annotator: AnnotatorConfig) -> list[bool]:
    """Whether the checkpoint's output comes first, for each request."""
    if annotator.orders == "both":
        return [False, True]
    return [bool(row_seed("order", annotator.name, row["id"], row["instruction"]) & 1)]


def _prompt(template: Turns, row: Row, checkpoint_first: bool) -> Turns:
    first, second = row["baseline_output"], row["output"]
    if checkpoint_first:
        first, second = second, first
    return fill(template, instruction=row["instruction"], output_1=first, output_2=second)


def _judgements(
    table: Sequence[Row],
    asked: Sequence[tuple[Row, bool]],
    replies: dict[int, Reply],
    reasons: dict[int, str],
    annotator: AnnotatorConfig,
) -> Iterator[Row]:
    """One judgement for each output, from one or two verdicts."""
    by_row: dict[str, list[int]] = {row["id"]: [] for row in table}
    for number, (row, _) in enumerate(asked):
        by_row[row["id"]].append(number)
    for row, numbers in zip(table, by_row.values(), strict=True):
        verdicts = {n: read_reply(replies[n], annotator) for n in numbers if n in replies}
        lost = [reasons[n] for n in numbers if n in reasons]
        lost += [f"{UNPARSABLE}: {v.text[:100]!r}" for v in verdicts.values() if v.second is None]
        preference = 1.5 if _same(row) else None
        if numbers and not lost:
            shares = [1 - v.second if asked[n][1] else v.second for n, v in verdicts.items() if v.second is not None]
            preference = 1.0 + fmean(shares)
        yield {
            "id": row["id"],
            "checkpoint": row["checkpoint"],
            "annotator": annotator.name,
            "preference": preference,
            "reason": lost[0] if lost else None,
            "verdicts": [verdict.text for verdict in verdicts.values()],
            "checkpoint_first": [asked[n][1] for n in numbers],
        }


def _record(row: Row, judgement: Row) -> Row:
    """AlpacaEval's form."""
    return {
        "index": int(row["id"].rpartition("-")[2]),
        "instruction": row["instruction"],
        "dataset": row["dataset"],
        "generator_1": row["baseline"],
        "output_1": row["baseline_output"],
        "generator_2": row["checkpoint"],
        "output_2": row["output"],
        "annotator": judgement["annotator"],
        "preference": judgement["preference"],
    }


def read_instructions(config: AlpacaConfig) -> list[Row]:
    """Instructions with the baseline's outputs.

    Raises:
        UserError: no such file, the hub can't be reached, or a row lacks a field.
    """
    path = _from_hub(config.instructions) if on_hub(config.instructions) else config.instructions
    try:
        text = path.read_text(encoding="utf-8-sig")
        table = (
            [json.loads(line) for line in text.split("\n") if line.strip()]
            if path.suffix == ".jsonl"
            else json.loads(text)
        )
    except OSError as error:
        raise UserError(f"eval.alpaca.instructions={path} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from error
    if not isinstance(table, list) or not table:
        raise UserError(f"{path} must hold a list of instructions")
    return [_instruction(path, number, row) for number, row in enumerate(table[: config.limit])]


def _instruction(path: Path, number: int, row: Any) -> Row:
    for field in ("instruction", "output", "generator"):
        if not isinstance(row, dict) or not isinstance(row.get(field), str) or not row[field]:
            raise UserError(f"{path}: row {number} has no text {field!r}: the baseline's outputs are needed too")
    return {
        "id": f"instruction-{number:06d}",
        "instruction": row["instruction"],
        "dataset": str(row.get("dataset", "")),
        "baseline_output": row["output"],
        "baseline": row["generator"],
    }


def _from_hub(name: Path) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(str(name), HUB_FILE, repo_type="dataset"))
    except Exception as error:  # its many causes have no common class
        raise UserError(
            f"eval.alpaca.instructions={name}: {HUB_FILE} can't be had from the hub ({type(error).__name__}); download "
            "it before, or name a local file"
        ) from error


def estimate(config: EvalConfig, outputs: Artifact, judged: Sequence[Artifact]) -> list[Metric]:
    """Win rates by annotator in percent, as AlpacaEval prints them, and the mean length of outputs in characters."""
    lengths = [len(text) for text in outputs.column("output")]
    control = config.alpaca.length_control if config.alpaca else "minimal"
    found = [Metric("average_length", fmean(lengths), len(lengths))]
    for artifact in judged:
        records = json.loads((artifact.path / ANNOTATIONS).read_text())
        rates, name = win_rates(records, control), records[0]["annotator"]
        wins = [record["preference"] - 1 for record in records if record["preference"] is not None]
        for key, values in (
            ("win_rate", wins),
            ("discrete_win_rate", [float(w > 0.5) + 0.5 * (w == 0.5) for w in wins]),
        ):
            bounds = mean_interval(values, "instructions", shares=True)
            low, high = (None if bound is None else 100 * bound for bound in (bounds.low, bounds.high))
            found.append(Metric(f"{name}/{key}", rates[key], len(values), low, high, bounds.method))
        n = len(wins)
        if rates["length_controlled_win_rate"] is not None:
            found.append(Metric(f"{name}/{rates['lc_method']}", rates["length_controlled_win_rate"], n))
    return found


def _config(bench: SuiteContext) -> AlpacaConfig:
    config = bench.run.config.eval.alpaca
    assert config is not None  # EvalConfig sees to that
    return config


SUITE = Suite(measure, estimate, conclude)
