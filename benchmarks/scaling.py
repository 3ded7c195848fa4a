"""How training scales over workers: speed, communication, what Ray Train adds, what checkpoints hold up.

A Qwen2 of 4.5M random parameters, random pairs, processes over Gloo that run the project's own training loop.

    python -m benchmarks.scaling [--part {a,b,c,d} ...] [--steps N]

``a`` steps with 1, 2 and 4 workers, against what the machine gives as many processes that only multiply matrices;
``b`` bytes that a worker sends in a step, as multiples of what FSDP needs for one forward and backward;
``c`` the same training under torchrun and under Ray Train;
``d`` how long checkpoints hold up training, written in the background and not.
"""

import argparse
import inspect
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.multiprocessing as mp

from benchmarks.common import random_inputs, rate_of_all
from spo_ray.config.load import load
from spo_ray.config.train import CheckpointConfig
from spo_ray.model.fsdp import decoder_layers
from spo_ray.model.load import build_policy
from spo_ray.runtime.artifact import external
from spo_ray.runtime.cluster import connect
from spo_ray.runtime.run import Run
from spo_ray.train import launch, worker
from spo_ray.train.checkpointer import Checkpointer
from spo_ray.train.data_loader import RowTable
from spo_ray.train.distributed import Distributed
from spo_ray.train.entry import train_loop
from spo_ray.train.loop import StepLog
from spo_ray.train.spec import TrainJob

ROOT = Path(__file__).resolve().parents[1]
BATCH, EPOCH = 8, 5
SKIPPED = 2  # steps at the start
ENVIRONMENT = launch.KEEP_MEMORY | {"OMP_NUM_THREADS": "1"}
METHODS = ("sft", "dpo", "spo", "spo_hinge")
SPO = "methods.{}={{type: spo, gamma: {}, inner: {{{}}}}}"
UNWATCHED = "probe_every=100000 probe_pairs=1 probe_top_tokens=0 dynamics_every=null"
BASE = [
    *(f"preference.{setting}" for setting in f"{UNWATCHED} batch_size={BATCH}".split()),
    *(f"sft.batch_size={2 * BATCH}", "train.checkpoint.every=null"),
    *(SPO.format("spo", 0.0, "eta: 1e-3"), SPO.format("spo_k0", 0.0, "steps: 0"), SPO.format("spo_hinge", 0.01, "")),
]
WHOLE = {"all_gather_single": "output_tensor", "reduce_scatter_single": "input", "all_reduce": "tensor"}
"""What FSDP2 and the step call, with the argument of which a ring sends (W - 1) / W, in an all-reduce twice.

DTensor's functions of the same names are counted too; they gather the directions of exact passes.
"""


class Step(NamedTuple):
    """One step of all workers."""

    seconds: float
    cpu: float  # of all workers
    gathered: float  # bytes that a worker sends
    reduced: float
    other: float
    save: float  # seconds in ``Checkpointer.save`` before this step


def job(folder: Path, name: str, method: str, workers: int, steps: int, *overrides: str) -> TrainJob:
    """A training of so many steps, whole epochs."""
    epochs = -(-steps // EPOCH)
    lengths = [f"preference.epochs={epochs}", f"sft.epochs={epochs}", f"train.num_workers={workers}"]
    config = load(ROOT / "configs" / "quickstart.yaml", [*BASE, *lengths, f"output={folder / 'runs'}", *overrides])
    pairs = external(folder / ("sides" if method == "sft" else "pairs"))
    return TrainJob(
        config=config,
        model=str(folder / "model"),
        rows=pairs,
        out=str(folder / name),
        key=name,
        method=None if method == "sft" else method,
    )


def instrument() -> None:
    """Make this process write a line of clocks and counts behind every step; it exports nothing."""
    run_job, write, save = worker.run_job, StepLog.write, Checkpointer.save
    notes: dict[str, Any] = {"save": 0.0} | dict.fromkeys(WHOLE, 0.0)

    def recorded(job: TrainJob, rank: Distributed, *others: Any) -> None:
        notes["path"] = Path(job.out) / f"clocks{rank.index}.jsonl"
        run_job(job, rank, *others)

    def written(log: StepLog, record: dict[str, float]) -> None:
        write(log, record)
        line = {"wall": time.time(), "cpu": time.process_time(), "active": record.get("spo/hinge_active")}
        with notes["path"].open("a") as file:
            file.write(json.dumps(line | {key: notes[key] for key in ("save", *WHOLE)}) + "\n")
        notes.update({"save": 0.0} | dict.fromkeys(WHOLE, 0.0))

    def saved(*arguments: Any) -> None:
        started = time.perf_counter()
        save(*arguments)
        notes["save"] += time.perf_counter() - started

    def counted(owner: Any, name: str, argument: str) -> Callable[..., Any]:
        function = getattr(owner, name)
        signature = inspect.signature(function)
        parts = dist.get_world_size() if (owner, name) == (funcol, "all_gather_single") else 1  # it is given a shard

        def call(*arguments: Any, **named: Any) -> Any:
            tensor = signature.bind(*arguments, **named).arguments[argument]
            sent = parts * (1 - 1 / dist.get_world_size())
            notes[name] += (1 + (name == "all_reduce")) * tensor.numel() * tensor.element_size() * sent
            return function(*arguments, **named)

        return call

    calls = [(dist, *item) for item in WHOLE.items()]
    calls += [(funcol, name, "self") for name in ("all_gather_single", "reduce_scatter_single")]
    patches: list[tuple[Any, str, Any]] = [(owner, name, counted(owner, name, key)) for owner, name, key in calls]
    patches += [(worker, "run_job", recorded), (worker, "export_policy", lambda *arguments: None)]
    for owner, name, function in [*patches, (StepLog, "write", written), (Checkpointer, "save", saved)]:
        setattr(owner, name, function)


def instrumented_loop(arguments: dict[str, Any]) -> None:
    """Ray Train's entry."""
    instrument()
    train_loop(arguments)


def forked(folder: Path, jobs: Sequence[TrainJob], workers: int) -> None:
    """Run jobs one after another in copies of this process, which has imported all it needs."""
    arguments = (workers, f"{folder}/meeting_{jobs[0].key}", jobs)
    mp.start_processes(_forked, arguments, nprocs=workers, start_method="fork")


def _forked(index: int, size: int, meeting: str, jobs: Sequence[TrainJob]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=index, world_size=size)
    work(jobs)


def work(jobs: Sequence[TrainJob]) -> None:
    """The jobs, each with a measurement of the machine before and after."""
    rank = Distributed(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    instrument()
    before = rate_of_all()
    for each in jobs:
        Path(each.out).mkdir(parents=True, exist_ok=True)
        worker.run_job(each, rank, Checkpointer(each.key, CheckpointConfig(every=None), rank), RowTable.of)
        after = rate_of_all()
        (Path(each.out) / "rate").write_text(str((before + after) / 2))
        before = after
    dist.destroy_process_group()


def torchrun(folder: Path, each: TrainJob, workers: int) -> tuple[float, Path]:
    """Run a job under PyTorch's launcher; gives when that was started, and where its files are."""
    path, started = folder / "job.pickle", time.time()
    path.write_bytes(pickle.dumps(each))
    command = ["torch.distributed.run", "--standalone", f"--nproc-per-node={workers}", "-m", "benchmarks.scaling"]
    subprocess.run([sys.executable, "-m", *command, "--job", str(path)], cwd=ROOT, check=True)
    return started, Path(each.out)


def under_ray(each: TrainJob) -> tuple[float, Path]:
    """Run a job under Ray Train; gives when that was started, and where its files are."""
    method = str(each.method)
    config = each.config.model_copy(update={"name": each.key, "methods": {method: each.config.methods[method]}})
    setattr(launch, "train_loop", instrumented_loop)  # noqa: B010
    started = time.time()
    trained = launch.train_methods(Run(config), {method: launch.Start(external(each.model), each.rows)})
    return started, trained[method].path


def clocks(out: Path, workers: int) -> list[list[dict[str, Any]]]:
    """Every worker's lines."""
    files = [out / f"clocks{index}.jsonl" for index in range(workers)]
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def steps_of(out: Path, workers: int) -> list[Step]:
    """A job's steps, but for the first ones, the last (it measures the probe), and those whose hinge was inactive."""
    ranks, steps = clocks(out, workers), []
    for before, after in list(pairwise(zip(*ranks, strict=True)))[SKIPPED:-1]:
        if after[0]["active"] == 0.0:  # which makes fewer passes
            continue
        cpu = sum(b["cpu"] - a["cpu"] for a, b in zip(before, after, strict=True))
        sent = [after[0][name] for name in WHOLE]
        steps.append(Step(after[0]["wall"] - before[0]["wall"], cpu, *sent, max(line["save"] for line in after)))
    return steps


def median(steps: Sequence[Step]) -> Step:
    """Of every field."""
    return Step(*map(statistics.median, zip(*steps, strict=True)))


def speed(folder: Path, steps: int, only: Sequence[str] = (), counts: Sequence[int] = (1, 2, 4)) -> None:
    """Part a."""
    one: dict[str, tuple[Step, float]] = {}
    names, table = only or METHODS, external(folder / "sides").rows()
    mean = statistics.mean(len(r["prompt_ids"]) + len(r["completion_ids"]) for r in table)
    print("| step | workers | tokens/s | speed-up | of matmuls alone | share of it | CPU time, ratio | in step, s |")
    lines = []
    for workers in counts:
        jobs = [job(folder, f"a_{name}_{workers}", name, workers, steps) for name in names]
        forked(folder, jobs, workers)
        for name, each in zip(names, jobs, strict=True):
            step, rate = median(steps_of(Path(each.out), workers)), float((Path(each.out) / "rate").read_text())
            base, base_rate = one.setdefault(name, (step, rate))
            tokens = mean * 2 * BATCH / step.seconds
            up, allowed = base.seconds / step.seconds, rate / base_rate
            lines.append(f"| {name} | {workers} | {tokens:.0f} | {up:.2f} | {allowed:.2f} | {up / allowed:.0%} | "
                         f"{step.cpu / base.cpu:.2f} | {step.seconds:.2f} |")  # fmt: skip
    print("\n".join(sorted(lines, key=lambda line: METHODS.index(line.split()[1]))))


def sizes(each: TrainJob) -> tuple[int, int]:
    """Parameters inside and outside of the layers."""
    policy = build_policy(each.model, each.config.model, 0, with_phi=each.method is not None, device="meta")
    layers = sum(p.numel() for layer in decoder_layers(policy) for p in layer.parameters())
    return layers, sum(p.numel() for p in policy.parameters()) - layers


def communication(folder: Path, steps: int, only: Sequence[str] = (), workers: int = 2) -> None:
    """Part b."""
    few, rows_each = folder / "few", [f"sft.batch_size={2 * workers}", f"preference.batch_size={workers}"]
    random_inputs(few, steps * workers)  # a backward a step
    recompute = "train.gradient_checkpointing=true"
    cases: list[tuple[str, str, list[str]]] = [("spo_k0", "bfloat16", []), ("spo", "bfloat16", [recompute])]
    cases = [(name, precision, []) for precision in ("float32", "bfloat16") for name in METHODS] + cases
    cases = [case for case in cases if f"{case[0]},{case[1]}" in only] if only else cases
    jobs = [job(few, f"b_{i}", name, workers, 1, *rows_each, f"train.precision={precision}", *more)
            for i, (name, precision, more) in enumerate(cases)]  # fmt: skip
    forked(folder, jobs, workers)
    print("| step | compute type | MB sent | gathers | reductions | of the minimum |")
    for (name, precision, more), each in zip(cases, jobs, strict=True):
        sent = median(steps_of(Path(each.out), workers))
        layers, root = sizes(each)
        width, part = 2 if precision == "bfloat16" else 4, (workers - 1) / workers
        gathers, reductions = (2 * layers + root) * width * part, (layers + root) * 4 * part
        total = sent.gathered + sent.reduced + sent.other
        ratios = (sent.gathered / gathers, sent.reduced / reductions, total / (gathers + reductions))
        columns = [name + ", recompute" * bool(more), precision, f"{total / 1e6:.1f}", *(f"{x:.2f}" for x in ratios)]
        print(f"| {' | '.join(columns)} |")


def against_torchrun(folder: Path, steps: int, only: Sequence[str] = (), workers: int = 2) -> None:
    """Part c."""
    steady = []
    for name in only or ("torchrun", "ray"):
        each = job(folder, f"c_{name}", "dpo", workers, steps)
        if name == "ray":
            connect(each.config)
        started, out = under_ray(each) if name == "ray" else torchrun(folder, each, workers)
        steady.append(median(steps_of(out, workers)))
        first = clocks(out, workers)[0][0]["wall"] - started
        print(f"{name}: {steady[-1].seconds:.3f} s a step, {steady[-1].cpu:.3f} CPU s, {first:.1f} s until step 0")
    ratios = (steady[-1].seconds / steady[0].seconds, steady[-1].cpu / steady[0].cpu)
    print(f"the last against the first: {ratios[0] - 1:+.1%} wall, {ratios[1] - 1:+.1%} CPU")


def stalls(folder: Path, steps: int, only: Sequence[str] = (), workers: int = 2, every: int = 5) -> None:
    """Part d."""
    for i, background in enumerate(only or ("true", "false")):
        checkpoint = [f"train.checkpoint.every={every}", f"train.checkpoint.asynchronous={background}"]
        each = job(folder, f"d_{background}", "dpo", workers, steps, *checkpoint)
        if i == 0:
            connect(each.config)
        own = steps_of(under_ray(each)[1], workers)
        saves = [i for i, step in enumerate(own) if step.save]
        behind = {i + k for i in saves for k in range(2)}
        usual = statistics.median(step.seconds for i, step in enumerate(own) if i not in behind)
        save = statistics.median(own[i].save for i in saves)
        lost = statistics.median(sum(own[k].seconds - usual for k in (i, i + 1)) for i in saves if i + 1 < len(own))
        print(f"asynchronous={background}: step {usual:.3f} s, save() {save:.3f} s, with slower steps {lost:.3f} s;")
        print(f"per 100 steps {save / usual:.2f}% and {lost / usual:.2f}% of their time")


def main() -> None:
    """Measure what is asked for, all of it by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--steps", type=int, help="of every training")
    parser.add_argument("--only", nargs="+", default=[], help="cases: dpo (a), dpo,bfloat16 (b), ray (c), true (d)")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    missing = [f"{key}={value}" for key, value in ENVIRONMENT.items() if os.environ.get(key) != value]
    if missing:
        raise SystemExit(f"set {' '.join(missing)}: that is what Ray Train's workers have")
    if arguments.job:
        dist.init_process_group("gloo")
        work([pickle.loads(arguments.job.read_bytes())])
        return
    with tempfile.TemporaryDirectory() as folder:
        random_inputs(Path(folder), EPOCH * BATCH)
        for part in arguments.part:
            measure, steps = PARTS[part]
            measure(Path(folder), arguments.steps or steps, arguments.only)


PARTS = {"a": (speed, 10), "b": (communication, 4), "c": (against_torchrun, 30), "d": (stalls, 30)}

if __name__ == "__main__":
    main()
