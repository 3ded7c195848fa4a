"""Training stages through Ray Train."""

import json
import shutil
import threading
from functools import partial
from pathlib import Path
from typing import Any

from ray.train import RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer

from spo_ray.cluster import uses_gpu
from spo_ray.errors import UserError
from spo_ray.parallel import run_parallel
from spo_ray.run import STEP_LOG, Artifact, OpenStage, Run, say
from spo_ray.train.job import RESULT, Job, train_loop

REPORT_EVERY_S = 5.0
NO_MATTER = {"parallel_methods", "cpus_per_worker", "gradient_checkpointing", "pairs_per_backward"}
"""Training settings that change speed and memory, not results."""
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
"""glibc keeps freed memory: on a CPU, getting the same large tensors from the system anew takes a fifth of a step."""


def train_sft(run: Run, model: Artifact, rows: Artifact) -> Artifact:
    """Supervised fine-tuning of the base model; a merged checkpoint."""
    settings = {"sft": run.config.sft.model_dump(), "train": _identity(run)}
    stage = run.open("sft", config=settings, inputs={"model": model, "rows": rows})
    if isinstance(stage, Artifact):
        return stage
    # In a thread, like the methods: in the main thread Ray Train replaces the handler of Ctrl-C for good.
    return run_parallel({"sft": partial(_train, run, [stage], model, rows)}, 1)["sft"]["sft"]


def train_methods(run: Run, model: Artifact, pairs: Artifact, held_out: Artifact | None = None) -> dict[str, Artifact]:
    """Every configured preference method, each from the SFT checkpoint on the same pairs; merged checkpoints.

    Methods share a group of workers, one after another: starting a group takes far longer than a small model's
    training. ``train.parallel_methods`` groups work side by side.
    """
    config = run.config
    inputs = {"model": model, "pairs": pairs} | ({} if held_out is None else {"held_out": held_out})
    stages = {
        name: run.open(
            f"method_{name}",
            config={
                "method": method.model_dump(),
                "preference": config.preference.model_dump(),
                "train": _identity(run),
                "lora": config.model.model_dump(include={"lora_rank", "lora_alpha", "lora_targets"}),
            },
            inputs=inputs,
        )
        for name, method in config.methods.items()
    }
    pending = [stage for stage in stages.values() if isinstance(stage, OpenStage)]
    groups = [pending[i :: config.train.parallel_methods] for i in range(config.train.parallel_methods)]
    calls = {group[0].name: partial(_train, run, group, model, pairs, held_out) for group in groups if group}
    trained: dict[str, Artifact] = {}
    for closed in run_parallel(calls, len(groups)).values():
        trained |= closed
    return {n: s if isinstance(s, Artifact) else trained[s.name] for n, s in stages.items()}


def _train(
    run: Run, stages: list[OpenStage], model: Artifact, rows: Artifact, held_out: Artifact | None = None
) -> dict[str, Artifact]:
    """Train stages one after another in one group of workers; those that finished count, even if a later one fails."""
    count = len(rows.rows())
    for stage in stages:
        _check_batches(run, stage.name, count)
    jobs = []
    for stage in stages:
        stage.ledger.read = stage.ledger.kept = count
        method = stage.name.removeprefix("method_") if stage.name != "sft" else None
        jobs.append(Job(run.config, str(model.path), rows, str(stage.scratch), method, held_out))
    closed = {}
    try:
        _fit(run, jobs, [stage.name for stage in stages])
    finally:
        for stage in stages:
            if (stage.scratch / RESULT).exists():
                result = json.loads((stage.scratch / RESULT).read_text())
                closed[stage.name] = run.close(stage, wall_s=result["wall_s"])
    return closed


def _check_batches(run: Run, name: str, count: int) -> None:
    """Every worker needs a row of every batch."""
    section = "sft" if name == "sft" else "preference"
    batch_size, workers = getattr(run.config, section).batch_size, run.config.train.num_workers
    if count // -(-count // batch_size) < workers:
        raise UserError(
            f"{name}: {count} rows in batches of {batch_size} leave some of the {workers} workers without a row: "
            f"raise {section}.batch_size, or lower train.num_workers"
        )


def _identity(run: Run) -> dict[str, Any]:
    """The training settings that change results."""
    return run.config.train.model_dump(exclude=NO_MATTER)


def _fit(run: Run, jobs: list[Job], names: list[str]) -> None:
    """Run jobs to their end. Ray Train's own records are of no use afterwards: all results are in the jobs' folders.

    Raises:
        RuntimeError: a worker failed; the message is the worker's own error.
    """
    use_gpu = uses_gpu(run.config)
    config, records = run.config.train, run.root / ".unfinished" / f".ray_train_{names[0]}"
    shutil.rmtree(records, ignore_errors=True)
    environment: dict[str, Any] = {} if use_gpu else {"worker_runtime_env": {"env_vars": KEEP_MEMORY}}
    options: dict[str, Any] = {  # untyped: which of Ray's two ScalingConfigs is meant depends on the environment
        "scaling_config": ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": config.cpus_per_worker} | ({"GPU": 1.0} if use_gpu else {}),
        ),
        "torch_config": TorchConfig(backend="nccl" if use_gpu else "gloo"),
        "run_config": RunConfig(name="train", storage_path=str(records), **environment),
    }
    trainer = TorchTrainer(train_loop, train_loop_config={"jobs": jobs}, **options)
    finished = threading.Event()
    watcher = threading.Thread(target=_follow, args=(jobs, names, finished), daemon=True)
    watcher.start()
    try:
        trainer.fit()
    except WorkerGroupError as error:
        rank, cause = min(error.worker_failures.items())
        raise RuntimeError(f"training worker {rank} failed: {cause}") from error
    finally:
        finished.set()
        watcher.join()
    shutil.rmtree(records, ignore_errors=True)


def _follow(jobs: list[Job], names: list[str], finished: threading.Event) -> None:
    """Print the newest line of the growing step logs every few seconds."""
    shown: dict[str, str] = {}
    while not finished.wait(REPORT_EVERY_S):
        for job, name in zip(jobs, names, strict=True):
            log = Path(job.out) / STEP_LOG
            lines = log.read_text().splitlines() if log.exists() else []
            if len(lines) > 1 and shown.get(name) != lines[-1]:
                shown[name] = lines[-1]
                _say_step(name, lines[-1])


def _say_step(name: str, line: str) -> None:
    try:
        record = json.loads(line)
    except ValueError:  # it is being written
        return
    logps = f", log pi(y_w) {record['logps/chosen']:.2f}" if "logps/chosen" in record else ""
    say(name, f"step {record['step']}/{record['total_steps']}, loss {record['loss']:.4f}{logps}")
