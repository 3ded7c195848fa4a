"""Suite ``alpaca_eval``: answers to instructions, judged against a baseline's answers."""

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from spo_ray.config.data import EngineConfig
from spo_ray.config.evaluate import AlpacaConfig, AnnotatorConfig, EvalConfig
from spo_ray.config.model import TemplateConfig
from spo_ray.data.sample import row_seed
from spo_ray.errors import UserError
from spo_ray.evaluate.actors import Actors, Pass
from spo_ray.evaluate.judge import Cache, Keep, Reply, Turns, ask_endpoint, fill, identity, read_template, read_verdict
from spo_ray.evaluate.statistics import mean_interval
from spo_ray.evaluate.suite import Metric, Results, Suite, SuiteContext
from spo_ray.evaluate.win_rates import read_records, win_rates
from spo_ray.model.completion import Skipped
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
"""Requests that a local judge answers before their replies are kept."""
Ask = Callable[[Sequence[Turns], Keep], dict[int, str]]
"""Sends requests like :func:`spo_ray.evaluate.judge.ask_endpoint`."""
Request = tuple[str, bool]
"""(id of an output, True if the checkpoint's output is shown first)."""


def measure(context: SuiteContext, name: str, checkpoint: Artifact) -> Artifact:
    """Answer the instructions (:class:`schema.Output`)."""
    config = _config(context)
    settings = config.model_dump(include={"limit", "temperature", "max_tokens"})
    settings["batch_size"] = context.run.config.eval.batch_size

    def build(out: Path, counts: RowCounts) -> None:
        table = read_instructions(config)
        counts.facts |= context.provenance(checkpoint, settings)
        sampling = Pass(0 if config.temperature else None, config.temperature)
        kept = []
        for _, row, answers in context.answer(checkpoint, table, [sampling], config.max_tokens, "instruction"):
            if isinstance(answers, Skipped):
                counts.reject(row["id"], answers.reason, row["instruction"])
                continue
            (answer,) = answers.completions
            kept.append(row | {"checkpoint": name, "output": answer.text.strip(), "finished": answer.finished})
        counts.read, counts.kept = len(table), len(kept)
        require_rows(len(kept), f"instructions for alpaca_{name} that the engine can take", counts)
        write_rows(out / "part-0.parquet", kept, schema.Output)

    inputs = {"model": checkpoint, "instructions": external(config.instructions)}
    note = f"answers of up to {config.max_tokens} tokens"
    work = context.work(note, rows=config.limit, tokens=times(config.limit, config.max_tokens))
    return context.run.execute(Stage(f"alpaca_{name}", build, {**context.identity, **settings}, inputs, work))


def second_pass(context: SuiteContext, checkpoints: Results, measured: Results) -> dict[str, list[Artifact]]:
    """Let every annotator judge every checkpoint's outputs (:class:`schema.Judgement`, AlpacaEval's annotations.json).

    Raises:
        UserError: after all annotators, if one could not judge enough outputs.
    """
    config = _config(context)
    found: dict[str, list[Artifact]] = {name: [] for name in measured}
    failed: list[str] = []
    dated = TemplateConfig(template_date=context.run.config.model.template_date)  # the other fields are the policy's
    context.evaluator.free_engines()  # local judges need the memory
    for annotator in config.annotators:
        template: Turns = [] if context.run.mode == "read" else read_template(annotator)
        requests = 2 if annotator.orders == "both" else 1
        note, where = f"verdicts of {annotator.model}, {requests} requests each", "the engine of eval.alpaca.annotators"
        work = engine_work(annotator.engine, where, note, rows=config.limit)
        own = {"orders": annotator.orders, "template": template, "max_unjudged": config.max_unjudged}
        with _asker(annotator, dated) as (ask, model):
            for name, outputs in measured.items():
                build = partial(_judge, context, annotator, template, outputs, ask, model)
                settings = identity(annotator, model) | {"verdict": annotator.verdict} | own
                stage = f"judged_{name}@{annotator.name}"
                try:
                    found[name].append(context.run.execute(Stage(stage, build, settings, {"outputs": outputs}, work)))
                except UserError as error:
                    failed.append(str(error))
    if failed:
        raise UserError("\n".join(failed))
    return found


@contextmanager
def _asker(annotator: AnnotatorConfig, own: TemplateConfig) -> Generator[tuple[Ask, Artifact]]:
    """Provide a function that asks an annotator, whose template is ``own``, and the annotator's model."""
    if not isinstance(annotator.engine, EngineConfig):
        yield partial(ask_endpoint, annotator), Artifact(Path(annotator.model), annotator.model)
        return
    model, actors = external(annotator.model), Actors(annotator.engine, own)
    with actors.lease() as evaluator:

        def ask(requests: Sequence[Turns], keep: Keep) -> dict[int, str]:
            failed = {}
            for start in range(0, len(requests), JUDGED_AT_ONCE):
                replies = evaluator.judge(model.path, requests[start : start + JUDGED_AT_ONCE], annotator)
                for index, reply in enumerate(replies, start):
                    if isinstance(reply, Skipped):
                        failed[index] = reply.reason
                    else:
                        keep(index, reply)
            return failed

        try:
            yield ask, model
        finally:
            actors.close()


def _judge(
    context: SuiteContext,
    annotator: AnnotatorConfig,
    template: Turns,
    outputs: Artifact,
    ask: Ask,
    model: Artifact,
    out: Path,
    counts: RowCounts,
) -> None:
    """Ask about the outputs that the cache has no reply for, and write the judgements."""
    table = outputs.rows()
    prompts = {(row["id"], first): _prompt(template, row, first) for row in table for first in _orders(row, annotator)}
    settings = identity(annotator, model)
    keys = {request: Cache.key(prompt=prompt, **settings) for request, prompt in prompts.items()}
    cache = Cache(context.run.root.parent / ".judgements.sqlite")
    replies = {request: reply for request, key in keys.items() if (reply := cache.get(key)) is not None}
    missing, known = [request for request in prompts if request not in replies], len(replies)

    def keep(index: int, reply: Reply) -> None:
        replies[missing[index]] = reply
        if annotator.verdict != "weighted" or reply.logps:  # a reply without a verdict is asked for again
            cache.put(keys[missing[index]], reply)

    log(f"judge {annotator.name}", f"{len(missing)} requests to send, {known} answers are known from before")
    failed = ask([prompts[request] for request in missing], keep) if missing else {}
    cache.close()
    reasons = {missing[index]: reason for index, reason in failed.items()}
    counts.facts |= {"requests": len(missing), "cached": known, "orders": annotator.orders} | _usage(replies, annotator)
    judged = [_judgement(row, replies, reasons, annotator) for row in table]
    unjudged = [row for row in judged if row["preference"] is None]
    for row in unjudged:
        kind, _, detail = row["reason"].partition(": ")
        counts.reject(row["id"], kind, detail)
    if len(unjudged) / len(judged) > _config(context).max_unjudged:
        raise _too_many(context.run, annotator, table[0]["checkpoint"], unjudged, len(judged))
    counts.read, counts.kept = len(judged), len(judged) - len(unjudged)
    write_rows(out / "part-0.parquet", judged, schema.Judgement)
    write_json(out / ANNOTATIONS, [_annotation(row, j) for row, j in zip(table, judged, strict=True)])


def _usage(replies: Mapping[Request, Reply], annotator: AnnotatorConfig) -> Row:
    tokens = [sum(reply.tokens[side] for reply in replies.values()) for side in (0, 1)]
    usage: Row = {"prompt_tokens": tokens[0], "answer_tokens": tokens[1]}
    usage["with_logprobs"] = sum(reply.logps is not None for reply in replies.values())
    if annotator.price_per_million:
        usage["cost"] = sum(n * price / 1e6 for n, price in zip(tokens, annotator.price_per_million, strict=True))
    return usage


def _too_many(run: Run, annotator: AnnotatorConfig, checkpoint: str, unjudged: list[Row], count: int) -> UserError:
    """Write all reasons to a file, and return the error that names it."""
    file = run.root / f"unjudged_{checkpoint}@{annotator.name}.json"
    write_json(file, [{key: row[key] for key in ("id", "reason")} for row in unjudged])
    unclear = sum(row["reason"].startswith(UNPARSABLE) for row in unjudged)
    return UserError(
        f"annotator {annotator.name} left {len(unjudged)} of {count} outputs of {checkpoint} without a verdict "
        f"({len(unjudged) - unclear} failed requests, {unclear} unparsable answers; all of them in {file}), more than "
        "eval.alpaca.max_unjudged: the same command asks again where requests failed, and there alone"
    )


def _orders(row: Row, annotator: AnnotatorConfig) -> list[bool]:
    """Return one value for each request about an output: True if the checkpoint's output is shown first.

    Outputs that equal the baseline's are a draw without a request, as in AlpacaEval.
    """
    if row["output"] == row["baseline_output"]:
        return []
    if annotator.orders == "both":
        return [False, True]
    return [bool(row_seed("order", annotator.name, row["id"], row["instruction"]) & 1)]


def _prompt(template: Turns, row: Row, checkpoint_first: bool) -> Turns:
    first, second = row["baseline_output"], row["output"]
    if checkpoint_first:
        first, second = second, first
    return fill(template, instruction=row["instruction"], output_1=first, output_2=second)


def _judgement(
    row: Row, replies: Mapping[Request, Reply], reasons: Mapping[Request, str], annotator: AnnotatorConfig
) -> Row:
    """Return the judgement of one output from its verdicts; 1.5 is a draw."""
    requests = [(row["id"], first) for first in _orders(row, annotator)]
    verdicts = {request: read_verdict(replies[request], annotator) for request in requests if request in replies}
    lost = [reasons[request] for request in requests if request in reasons]
    lost += [f"{UNPARSABLE}: {replies[r].text[:100]!r}" for r, verdict in verdicts.items() if verdict is None]
    shares = [1 - second if first else second for (_, first), second in verdicts.items() if second is not None]
    return {
        "id": row["id"],
        "checkpoint": row["checkpoint"],
        "annotator": annotator.name,
        "preference": None if lost else 1.0 + fmean(shares or [0.5]),
        "reason": lost[0] if lost else None,
        "verdicts": [replies[request].text for request in verdicts],
        "checkpoint_first": [first for _, first in requests],
    }


def _annotation(row: Row, judgement: Row) -> Row:
    """Return a record in AlpacaEval's format."""
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
    """Return the instructions with the baseline's outputs.

    Raises:
        UserError: no such file, the hub can't be reached, or a row lacks a field.
    """
    path = _from_hub(config.instructions) if on_hub(config.instructions) else config.instructions
    table = read_records(path, "instructions", "eval.alpaca.instructions=")
    return [_instruction(path, number, row) for number, row in enumerate(table[: config.limit])]


def _instruction(path: Path, number: int, row: Any) -> Row:
    for field in ("instruction", "output", "generator"):
        if not isinstance(row, dict) or not isinstance(row.get(field), str) or not row[field]:
            raise UserError(f"{path}: row {number} has no text {field!r}: the baseline's outputs are needed too")
    source = {"instruction": row["instruction"], "dataset": str(row.get("dataset", ""))}
    return (
        {"id": f"instruction-{number:06d}"} | source | {"baseline_output": row["output"], "baseline": row["generator"]}
    )


def _from_hub(name: Path) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(str(name), HUB_FILE, repo_type="dataset"))
    except Exception as error:  # its many errors have no common class
        raise UserError(
            f"eval.alpaca.instructions={name}: {HUB_FILE} can't be had from the hub ({type(error).__name__}); download "
            "it before, or name a local file"
        ) from error


def metrics(config: EvalConfig, outputs: Artifact, judged: Sequence[Artifact]) -> list[Metric]:
    """Return win rates by annotator in percent, as AlpacaEval prints them, and the mean length in characters."""
    lengths = [len(text) for text in outputs.column("output")]
    control = config.alpaca.length_control if config.alpaca else "minimal"
    found = [Metric("average_length", fmean(lengths), len(lengths))]
    for artifact in judged:
        records = json.loads((artifact.path / ANNOTATIONS).read_text())
        rates, name = win_rates(records, control), records[0]["annotator"]
        wins = [record["preference"] - 1 for record in records if record["preference"] is not None]
        discrete = [float(w > 0.5) + 0.5 * (w == 0.5) for w in wins]
        for key, values in (("win_rate", wins), ("discrete_win_rate", discrete)):
            interval = mean_interval(values, "instructions", shares=True)
            low, high = (None if bound is None else 100 * bound for bound in interval[:2])
            found.append(Metric(f"{name}/{key}", rates[key], len(values), low, high, interval.method))
        if rates["length_controlled_win_rate"] is not None:
            found.append(Metric(f"{name}/{rates['lc_method']}", rates["length_controlled_win_rate"], len(wins)))
    return found


def _config(context: SuiteContext) -> AlpacaConfig:
    config = context.run.config.eval.alpaca
    assert config is not None  # EvalConfig checks it
    return config


SUITE = Suite(measure, metrics, second_pass)
