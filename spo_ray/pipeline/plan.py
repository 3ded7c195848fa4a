"""``spo-ray plan``: what a run would do, and what it would take, without doing it."""

import json
from collections.abc import Callable, Iterator

from spo_ray.config.schema import Config
from spo_ray.pipeline.estimate import Estimate, Estimator, free_bytes
from spo_ray.pipeline.outline import Line, outline
from spo_ray.pipeline.rehearsal import Rehearsal, rehearse
from spo_ray.runtime.artifact import MANIFEST
from spo_ray.runtime.run import Run

STATES = {"reused": "reused", "goes on": "goes on", "starts": "to do"}
HEADS = ("stage", "", "rows", "tokens", "memory", "disk", "time")
UNKNOWN = "?"


def plan(config: Config, stages: Callable[[Run], Iterator[str]]) -> tuple[str, str | None]:
    """The resolved configuration and a table of the stages for a terminal; and why the run would be refused, or None.

    Rows and tokens are upper bounds. Memory is per worker or engine, disk what stays.
    """
    run, estimator = rehearse(config, stages), Estimator(config)
    lines = list(outline(config))
    estimates = {line.stage: estimator.of(line) for line in lines}
    table = [HEADS, *(_cells(run, line, estimates[line.stage]) for line in lines)]
    widths = [max(len(row[i]) for row in table) for i in range(len(HEADS))]
    whats = ["what", *(f"{line.what} ({line.resources})" for line in lines)]
    text = [json.dumps(config.model_dump(mode="json"), indent=2), ""]
    for row, what in zip(table, whats, strict=True):
        sides = "<<" + ">" * (len(HEADS) - 2)
        cells = [f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)]
        text.append("  ".join([*cells, what]))
    text += ["", *_reasons(run), *_totals(config, run, lines, estimates)]
    return "\n".join(text), run.problem


def _cells(run: Rehearsal, line: Line, estimate: Estimate) -> tuple[str, ...]:
    time = UNKNOWN if estimate.seconds is None else f"{'' if estimate.measured else '~'}{_time(estimate.seconds)}"
    return (
        line.stage,
        _state(run, line.stage),
        "all" if line.rows is None else f"{line.rows:,}",
        _count(line.tokens),
        "" if estimate.memory is None else _size(estimate.memory),
        _size(estimate.disk) if estimate.disk else "",
        time,
    )


def _state(run: Rehearsal, stage: str) -> str:
    if stage in run.found:
        state, why = run.found[stage]
        return "again" if why else STATES[state]
    return "there" if (run.root / stage / MANIFEST).exists() else "to do"


def _reasons(run: Rehearsal) -> Iterator[str]:
    """Which difference makes which stage be made again."""
    found = {stage: why for stage, (_, why) in run.found.items() if why}
    if found:
        yield "Made again, because of:"
        width = max(map(len, found))
        yield from (f"  {stage:<{width}}  {why}" for stage, why in found.items())
        yield ""


def _totals(config: Config, run: Rehearsal, lines: list[Line], estimates: dict[str, Estimate]) -> Iterator[str]:
    left = [line for line in lines if _state(run, line.stage) != "reused"]
    seconds = [estimates[line.stage].seconds for line in left]
    tokens, disk = sum(line.tokens or 0 for line in left), sum(estimates[line.stage].disk for line in left)
    most = max((estimates[line.stage].while_it_runs for line in left), default=0)
    known = sum(value for value in seconds if value is not None)
    bound = "" if all(estimates[line.stage].measured for line in left) else "about "
    yield f"Left to do: {len(left)} of {len(lines)} stages, at most {_count(tokens) or 0} tokens, {bound}{_time(known)}"
    room = free_bytes(config.output)
    yield f"Disk: {_size(disk)}, and up to {_size(most)} of checkpoints while a method trains; {_size(room)} are free"
    if disk + most > room:
        yield f"There is too little room in {config.output.absolute()}: set output=, or keep fewer checkpoints"
    yield "Times without ~ are those of an earlier run; the others are arithmetic, for the most rows there can be, "
    yield "without the starts of engines and workers: a quarter to half a minute for each stage that has some."


def _count(value: int | None) -> str:
    if not value:
        return ""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.1f}{unit}"
    return str(value)


def _size(value: float) -> str:
    for limit, unit in ((2**30, "GiB"), (2**20, "MiB")):
        if value >= limit:
            return f"{value / limit:.1f} {unit}"
    return f"{value / 2**10:.0f} KiB"


def _time(seconds: float) -> str:
    for limit, unit in ((3600.0, "h"), (60.0, "min")):
        if seconds >= limit:
            return f"{seconds / limit:.1f} {unit}"
    return f"{seconds:.1f} s"
