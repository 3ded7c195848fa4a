"""Training stages through Ray Train."""

import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ray.train import RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer

from spo_ray.run import STEP_LOG, Artifact, Ledger, Run, say
from spo_ray.train.job import Job, preference_loop, sft_loop

REPORT_EVERY_S = 5.0


def train_sft(run: Run, model: Artifact, rows: Artifact) -> Artifact:
    """Supervised fine-tuning of the base model; a merged checkpoint."""
    config = run.config
    settings = {"sft": config.sft.model_dump(), "train": _identity(run)}

    def build(out: Path, ledger: Ledger) -> None:
        ledger.read = ledger.kept = len(rows.rows())
        _fit(run, "sft", sft_loop, Job(config, str(model.path), rows, str(out)))

    return run.stage("sft", build, config=settings, inputs={"model": model, "rows": rows})


def train_methods(run: Run, model: Artifact, pairs: Artifact, held_out: Artifact | None = None) -> dict[str, Artifact]:
    """Every configured preference method, each from the SFT checkpoint on the same pairs; merged checkpoints."""
    names = list(run.config.methods)
    with ThreadPoolExecutor(run.config.train.parallel_methods) as threads:
        futures = {name: threads.submit(_train_method, run, name, model, pairs, held_out) for name in names}
        return {name: future.result() for name, future in futures.items()}


def _train_method(run: Run, name: str, model: Artifact, pairs: Artifact, held_out: Artifact | None) -> Artifact:
    config, stage = run.config, f"method_{name}"
    settings = {
        "method": config.methods[name].model_dump(),
        "preference": config.preference.model_dump(),
        "train": _identity(run),
        "lora": config.model.model_dump(include={"lora_rank", "lora_alpha", "lora_targets"}),
    }
    inputs = {"model": model, "pairs": pairs} | ({} if held_out is None else {"held_out": held_out})

    def build(out: Path, ledger: Ledger) -> None:
        ledger.read = ledger.kept = len(pairs.rows())
        _fit(run, stage, preference_loop, Job(config, str(model.path), pairs, str(out), name, held_out))

    return run.stage(stage, build, config=settings, inputs=inputs)


def _identity(run: Run) -> dict[str, Any]:
    """The training settings that change results."""
    return run.config.train.model_dump(exclude={"parallel_methods", "cpus_per_worker"})


def _fit(run: Run, name: str, loop: Callable[[dict[str, Any]], None], job: Job) -> None:
    """Run a loop to its end. Ray Train's own records are of no use afterwards: the loop leaves all results in job.out.

    Raises:
        RuntimeError: a worker failed; the message is the worker's own error.
    """
    config, records = run.config.train, Path(job.out) / ".ray_train"
    options: dict[str, Any] = {  # untyped: which of Ray's two ScalingConfigs is meant depends on the environment
        "scaling_config": ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=config.use_gpu,
            resources_per_worker={"CPU": config.cpus_per_worker} | ({"GPU": 1.0} if config.use_gpu else {}),
        ),
        "torch_config": TorchConfig(backend="nccl" if config.use_gpu else "gloo"),
        "run_config": RunConfig(name="train", storage_path=str(records)),
    }
    trainer = TorchTrainer(loop, train_loop_config={"job": job}, **options)
    finished = threading.Event()
    watcher = threading.Thread(target=_follow, args=(name, Path(job.out) / STEP_LOG, finished), daemon=True)
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


def _follow(name: str, log: Path, finished: threading.Event) -> None:
    """Print the newest line of a growing step log every few seconds."""
    shown = 0
    while not finished.wait(REPORT_EVERY_S):
        lines = log.read_text().splitlines() if log.exists() else []
        if len(lines) > max(1, shown):
            shown = len(lines)
            try:
                record = json.loads(lines[-1])
            except ValueError:  # a line that is being written
                continue
            logps = f", log pi(y_w) {record['logps/chosen']:.2f}" if "logps/chosen" in record else ""
            say(name, f"step {record['step']}/{record['total_steps']}, loss {record['loss']:.4f}{logps}")
