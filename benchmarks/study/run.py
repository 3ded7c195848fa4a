"""Run the study, or write its page.

    python -m benchmarks.study run [--parts tune final ...] [--regimes gold weaker ...] [--processes 2]
    python -m benchmarks.study tables

Every training is a row of benchmarks/study/rows.jsonl, written when it is done; what has a row is not run again.
``tables`` writes the made part of docs/study.md from the rows.
"""

import argparse
import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from queue import Empty

import torch

from benchmarks.study.jobs import PARTS, Job, Row, jobs
from benchmarks.study.measures import Measured, front, tested, validated
from benchmarks.study.page import write_page
from benchmarks.study.training import dialled, interpolated, train
from benchmarks.study.world import REGIMES, ROOT, Start, World, make

ROWS = Path(__file__).parent / "rows.jsonl"
MEASURES = {"tune": validated, "dial": front, "fronts": front}
"""What is measured in a part, if not everything."""


def measured(world: World, job: Job) -> Measured:
    """Do one job; the time is the training's."""
    measure = MEASURES.get(job.part, tested)
    if job.recipe is None:
        return {"measured": measure(world, world.reference)}
    trained = train(world, job.recipe, world.start.seed)
    found: Measured = {"measured": measure(world, trained.policy), "steps": trained.metrics, "seconds": trained.seconds}
    for scale in job.scales:
        with dialled(trained.policy, scale):
            found.setdefault("scales", {})[str(scale)] = measure(world, trained.policy)
    for share in job.shares:
        found.setdefault("shares", {})[str(share)] = measure(world, interpolated(world, trained.policy, share))
    return found


def work(task: tuple[Start, list[Job]]) -> Iterator[Row]:
    """Make a world and yield the row of each job in it; a training that fails is a row with its error."""
    start, todo = task
    torch.set_num_threads(1)
    world = make(start)
    for job in todo:
        torch.manual_seed(start.seed)
        try:
            yield job.key | measured(world, job)
        except Exception:  # whatever one training raises: the others go on, and the page counts failures
            yield job.key | {"error": traceback.format_exc(limit=-1)}


def run(parts: Iterable[str], regimes: list[str], processes: int) -> None:
    """Run the parts' jobs that have no row yet, one part after another."""
    for part in parts:
        done = [_key(row) for row in read_rows()]
        tasks: dict[Start, list[Job]] = {}
        for job in jobs(part, regimes, read_rows()):
            if _key(job.key) not in done:
                tasks.setdefault(job.start, []).append(job)
        for model in {start.model for start in tasks if not (ROOT / start.model).is_dir()}:
            raise SystemExit(f"{model} is missing: make {model}")
        total = sum(map(len, tasks.values()))
        print(f"{part}: {total} trainings in {len(tasks)} worlds", flush=True)
        began, count = time.monotonic(), 0
        context = multiprocessing.get_context("spawn")
        with context.Manager() as manager, context.Pool(processes) as pool:
            queue = manager.Queue()
            waiting = pool.map_async(_put, [(task, queue) for task in tasks.items()], chunksize=1)
            while count < total:
                try:
                    row = queue.get(timeout=10)
                except Empty:
                    if waiting.ready():
                        waiting.get()  # raises what ended a process
                    continue
                with ROWS.open("a", encoding="utf-8") as file:
                    file.write(f"{json.dumps(_short(row))}\n")
                count += 1
                what = row.get("error") or f"greedy {row['measured']['greedy']:.1%}"
                print(f"{part} {count}/{total}, {time.monotonic() - began:.0f} s: {row['name']}, {what}", flush=True)


def _put(argument: tuple) -> None:
    task, queue = argument
    for row in work(task):
        queue.put(row)


def read_rows() -> list[Row]:
    """Return the rows of all trainings."""
    return [json.loads(line) for line in ROWS.read_text("utf-8").splitlines()] if ROWS.exists() else []


def _key(row: Row) -> str:
    return json.dumps([row.get(key) for key in ("part", "start", "name", "recipe")], sort_keys=True)


def _short(value: object) -> object:
    """Return a row with five significant digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    return value


def main(arguments: Iterable[str] | None = None) -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "tables"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES))
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(None if arguments is None else list(arguments))
    if options.what == "run":
        run(options.parts, options.regimes, options.processes)
    write_page(read_rows())
