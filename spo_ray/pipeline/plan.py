"""``spo-ray plan``: the stages of a job with their states, and estimates of memory, disk and time.

The time of a stage is that of the same stage in an earlier run in the same output folder, scaled by its rows, if model,
data, precision, lengths, processes and hardware were the same. Without such a run it is computed for the upper bound of
rows: 2 operations per parameter and generated or scored token, 6 per token that is trained on, more for SPO (see
docs/performance.md), at a share of the speed of this machine's matrix products.
"""

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from math import ceil
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoConfig

from spo_ray.config.methods import MethodConfig, Spo
from spo_ray.config.schema import Config
from spo_ray.errors import UserError
from spo_ray.model.adapter import ModelSource
from spo_ray.model.completion import choose_engine
from spo_ray.model.memory import Device, MemoryEstimate, estimate_memory
from spo_ray.runtime.console import in_units
from spo_ray.runtime.manifest import MANIFEST, UnreadableError, read_manifest
from spo_ray.runtime.run import PlannedRun, PlannedStage, Work
from spo_ray.sweep.space import listed_points, short_text, sweep_of

HEADS = ("stage", "", "rows", "tokens", "memory", "disk", "time")
BYTES_PER_TOKEN = 6
"""Bytes of a generated or scored token (text, ids, counts) in compressed Parquet."""
EXPORTED, CHECKPOINTED = 4, 12
"""Bytes of a parameter in an exported model and in a checkpoint with AdamW's states."""
READING = 0.5
"""Share of the speed of matrix products that passes over whole texts reach."""
GENERATION: dict[Device, float] = {"cpu": 0.4, "cuda": 0.1}
"""The same of generation, which waits for memory on a GPU."""
MEASURED, COMPUTED = (0.8, 1.3), (0.3, 1.5)
"""Ranges around seconds of an earlier run, and around computed ones: lengths are below the bound, or engines slower."""
START_S = (2.0, 10.0)
"""Seconds of a stage for the start of its processes, which several stages share."""
VLLM_BYTES = 2 * 2**30
"""Memory of vLLM's process on a CPU beside weights and cache; 1.9 GiB were measured with a model of 135M."""


@dataclass(frozen=True)
class Estimate:
    """Estimated needs of one stage."""

    memory: int | None = None
    """Bytes of one worker or engine; None: unknown."""
    seconds: float | None = None
    """Seconds of the stage; None: unknown."""
    measured: bool = False
    """True if ``seconds`` comes from an earlier run, False if it is computed."""
    disk: int = 0
    """Bytes on disk after the stage."""
    checkpoints: int = 0
    """Bytes of checkpoints, which are deleted at the end of the stage."""


class Estimator:
    """Estimates the needs of the stages of one configuration."""

    def __init__(self, config: Config) -> None:
        self.config = config
        gpu = torch.cuda.is_available() if config.train.use_gpu is None else config.train.use_gpu
        self.device: Device = "cuda" if gpu else "cpu"

    @cached_property
    def model(self) -> Any:
        """The model's configuration; None if it can't be read, for instance without a network."""
        try:
            return AutoConfig.from_pretrained(ModelSource.of(self.config.model).model)
        except Exception:  # whatever transformers makes of it; the preflight says what is wrong
            return None

    @cached_property
    def engine(self) -> str:
        """The kind of engine; an empty text if the configured one is not installed."""
        try:
            return choose_engine(self.config.engine)[0]
        except UserError:
            return ""

    def steps(self, work: Work) -> int | None:
        """Return the upper bound of a training's steps; None: unknown."""
        settings = self.config.sft if work.trains == "sft" else self.config.preference
        if work.rows is None or settings is None:
            return None
        return ceil(work.rows / settings.batch_size) * settings.epochs

    def of(self, stage: PlannedStage) -> Estimate:
        """Return the estimate of a stage."""
        work = stage.work
        plan, seconds, tokens = self.memory_of(work.trains or "sft"), self.earlier_seconds(stage), work.tokens or 0
        if not plan or not tokens:
            return Estimate(None, seconds, seconds is not None)
        count, measured = plan.parameters["total"], seconds is not None
        if seconds is None:
            speed = products_per_second() * (GENERATION[self.device] if work.generates else READING)
            seconds = _operations(self.config, work) / speed * count
        if work.trains:
            checkpoint = self.config.train.checkpoint
            trained = plan.parameters["theta"] + plan.parameters["phi"]
            comes = checkpoint.every and (self.steps(work) or checkpoint.every) >= checkpoint.every
            kept = (checkpoint.keep + 1) * CHECKPOINTED * trained if comes else 0
            return Estimate(plan.total, seconds, measured, EXPORTED * count, kept)
        size = EXPORTED if self.config.engine.dtype == "float32" else 2
        memory = size * count
        if self.device == "cpu":
            cache = int(self.config.engine.memory_gib * 2**30)
            memory += cache + (VLLM_BYTES if self.engine == "vllm" else 0)
        return Estimate(memory, seconds, measured, BYTES_PER_TOKEN * tokens)

    def memory_of(self, stage: str) -> MemoryEstimate | None:
        """Return the memory estimate of ``sft`` or a method; None if the model or the settings are unusable."""
        if self.model is None:
            return None
        method: MethodConfig | None = None if stage == "sft" else self.config.methods[stage]
        try:
            return estimate_memory(self.config, self.model, stage, method, self.device)
        except Exception:  # such as of layers without a width; the preflight, or the run itself, says what is wrong
            return None

    def earlier_seconds(self, stage: PlannedStage) -> float | None:
        """Return the seconds of a stage by the newest run under the same conditions, scaled by rows, or None."""
        found: list[tuple[float, float]] = []
        for file in self.config.output.absolute().glob(f"*/{stage.name}/{MANIFEST}"):
            try:
                manifest = read_manifest(file.parent)
                if manifest is None or manifest.get("conditions") != stage.conditions:
                    continue
                read = manifest["rows"]["read"]
                scale = stage.work.rows / read if stage.work.rows and read else 1.0
                found.append((file.stat().st_mtime, manifest["wall_s"] * scale))
            except (OSError, UnreadableError):  # of another run, which this one does not depend on
                continue
        return max(found)[1] if found else None


def plan_text(plan: PlannedRun, full: bool = False) -> str:
    """Return a table of the stages, for a terminal; ``full``: after the resolved configuration.

    Rows are upper bounds. Memory is per worker or engine; disk is what stays.
    """
    config, estimator = plan.config, Estimator(plan.config)
    estimates = [estimator.of(stage) for stage in plan.planned]
    table = [HEADS, *(_cells(s, e) for s, e in zip(plan.planned, estimates, strict=True))]
    widths = [max(len(row[i]) for row in table) for i in range(len(HEADS))]
    notes = ["what", *(f"{s.work.note} ({_resources(s.work, estimator.device)})" for s in plan.planned)]
    text = [json.dumps(config.model_dump(mode="json"), indent=2), ""] if full else []
    for row, note in zip(table, notes, strict=True):
        sides = "<<" + ">" * (len(HEADS) - 2)
        cells = [f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)]
        text.append("  ".join([*cells, note]))
    return "\n".join([*text, "", *_reasons(plan.planned), *_totals(config, plan.planned, estimates)])


def trials_text(config: Config) -> str:
    """Return a line for every trial of a sweep, as far as they are known in advance."""
    sweep = sweep_of(config)
    if sweep.searcher == "optuna":
        keys = ", ".join(sweep.space)
        return f"{sweep.samples} suggestions by Optuna for {keys}; objectives {', '.join(sweep.objectives)}"
    lines = [f"trials of {sweep.method}; objectives {', '.join(sweep.objectives)}"]
    points = listed_points(config)
    for point in points:
        values = ", ".join(f"{key}={short_text(value, 6)}" for key, value in point["values"].items())
        lines.append(f"{point['number']:05d}  {values}  seed={point['seed']}")
    return "\n".join([*lines, f"{len(points)} trials"])


def _cells(stage: PlannedStage, estimate: Estimate) -> tuple[str, ...]:
    seconds = "" if estimate.measured else "~"
    return (
        stage.name,
        stage.state,
        "?" if stage.work.rows is None else f"{stage.work.rows:,}",
        _tokens([stage.work]),
        in_units(estimate.memory, "bytes"),
        in_units(estimate.disk, "bytes"),
        "?" if estimate.seconds is None else f"{seconds}{in_units(estimate.seconds, 'seconds') or '0 s'}",
    )


def _tokens(works: Sequence[Work]) -> str:
    """Return the tokens of stages, with ~ unless all are counted; empty without tokens."""
    counted = all(work.lengths and not work.lengths.sampled for work in works if work.tokens)
    text = in_units(sum(work.tokens or 0 for work in works), "count")
    return text if counted or not text else f"~{text}"


def _resources(work: Work, device: Device) -> str:
    if not work.actors:
        return "tasks of 1 CPU" if work.cpus else "driver"
    gpus = (1.0 if device == "cuda" else 0.0) if work.gpus is None else work.gpus
    text = f"{_plural(work.actors, 'worker' if work.trains else 'actor')} of {_plural(work.cpus, 'CPU')}"
    return f"{text}, {_plural(gpus, 'GPU')}" if gpus else text


def _plural(count: float, what: str) -> str:
    return f"{count:g} {what}{'' if count == 1 else 's'}"


def _reasons(planned: Sequence[PlannedStage]) -> Iterator[str]:
    found = {stage.name: stage.why for stage in planned if stage.why}
    if found:
        yield "Built again, because of:"
        width = max(map(len, found))
        yield from (f"  {stage:<{width}}  {why}" for stage, why in found.items())
        yield ""


def _totals(config: Config, planned: Sequence[PlannedStage], estimates: Sequence[Estimate]) -> Iterator[str]:
    left = [(s, e) for s, e in zip(planned, estimates, strict=True) if s.state != "reused"]
    disk = sum(e.disk for _, e in left)
    most = max((e.checkpoints for _, e in left), default=0)
    yield (
        f"Left to do: {len(left)} of {len(planned)} stages, {_tokens([s.work for s, _ in left]) or 0} tokens, "
        f"{range_text(expected_seconds(left))}"
    )
    if needs := [(e.memory * s.work.actors, s.name) for s, e in left if e.memory and s.work.actors]:
        most_memory, name = max(needs)
        there = in_units(psutil.virtual_memory().total, "bytes")
        yield f"Memory: up to {in_units(most_memory, 'bytes')} at a time, in {name}; this machine has {there}"
    room = free_bytes(config.output)
    yield (
        f"Disk: {in_units(disk, 'bytes') or '0 KiB'}, and up to {in_units(most, 'bytes') or '0 KiB'} of checkpoints "
        f"while a method trains; {in_units(room, 'bytes')} are free"
    )
    if disk + most > room:
        yield f"Too little space in {config.output.absolute()}: set output=, or lower train.checkpoint.keep"
    yield "Tokens without ~ are counted, those with ~ are estimated from some texts or from the longest allowed length."
    yield "Times without ~ are those of an earlier run with the same model, data, lengths, precision and hardware; "
    yield "those with ~ are computed. The sum has the start of engines and workers too, 2 to 10 seconds a stage."


def expected_seconds(left: Sequence[tuple[PlannedStage, Estimate]]) -> tuple[float, float]:
    """Return the seconds, from and to, that stages will take one after another, with the start of their processes."""
    low, high = 0.0, 0.0
    for stage, estimate in left:
        factors = MEASURED if estimate.measured else COMPUTED
        start = START_S if stage.work.actors and not estimate.measured else (0.0, 0.0)  # measured times have it
        low += (estimate.seconds or 0.0) * factors[0] + start[0]
        high += (estimate.seconds or 0.0) * factors[1] + start[1]
    return low, high


def expected_of(plan: PlannedRun) -> tuple[float, float]:
    """Return the seconds, from and to, that what is left of a plan will take."""
    estimator = Estimator(plan.config)
    return expected_seconds([(s, estimator.of(s)) for s in plan.planned if s.state != "reused"])


def range_text(seconds: tuple[float, float]) -> str:
    """Return a range of seconds in words."""
    low, high = (in_units(value, "seconds") or "0 s" for value in seconds)
    return low if low == high else f"{low} to {high}"


def _operations(config: Config, work: Work) -> float:
    """Return the floating-point operations of a stage per parameter."""
    if work.trains is None:
        return 2.0 * (work.tokens or 0)
    method = None if work.trains == "sft" else config.methods[work.trains]
    factor = (2.5 if method.gamma else 1.5) if isinstance(method, Spo) else 1.0
    return 6.0 * factor * (work.tokens or 0)


@cache
def products_per_second() -> float:
    """Return the floating-point operations per second of matrix products, measured on this machine."""
    matrix = torch.ones(1024, 1024, device="cuda" if torch.cuda.is_available() else "cpu")
    best = 0.0
    for _ in range(8):
        started = time.perf_counter()
        torch.mm(matrix, matrix)[0, 0].item()  # waits for a GPU
        best = max(best, 2.0 * len(matrix) ** 3 / (time.perf_counter() - started))
    return best


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the disk of a folder, which may not exist yet."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free
