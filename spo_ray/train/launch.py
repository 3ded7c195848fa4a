"""Training stages: SFT and preference methods as jobs of a Ray Train run."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from math import ceil
from typing import Any

from pyarrow.fs import FileSystem, FileType
from ray.exceptions import RayActorError
from ray.train import (
    CheckpointConfig,
    DataConfig,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    WorkerGroupError,
)
from ray.train.torch import TorchTrainer

from spo_ray.config.schema import Config
from spo_ray.errors import UserError
from spo_ray.model.memory import Device
from spo_ray.runtime.artifact import Artifact
from spo_ray.runtime.cluster import uses_gpu, worker_work
from spo_ray.runtime.console import log, warn
from spo_ray.runtime.failure import cause_of
from spo_ray.runtime.heartbeat import watched
from spo_ray.runtime.parallel import run_parallel
from spo_ray.runtime.run import TOLD, OpenStage, Run, Stage, Work, never_built, reading
from spo_ray.runtime.tracking import Trackers
from spo_ray.train.data_loader import dataset
from spo_ray.train.entry import ControllerCallback, mend_checkpoints, train_loop
from spo_ray.train.log_follower import Follower
from spo_ray.train.memory_check import estimate_memory
from spo_ray.train.method_state import method_identity
from spo_ray.train.rendezvous import BoundTorchConfig
from spo_ray.train.spec import CONTROLLER, RESULT, Start, TrainJob, failures_of, record_failure, text_of

MATTER = {"precision", "optimizer", "max_length"}
"""Training settings that change results beyond rounding."""
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
"""Makes glibc keep freed memory: on a CPU, allocating large tensors anew takes a fifth of a step."""


def train_sft(run: Run, model: Artifact, rows: Artifact) -> Artifact:
    """Supervised fine-tuning of the base model; a merged checkpoint."""
    sft, theta, matter = run.config.sft, run.config.model.theta, run.config.train.model_dump(include=MATTER)
    assert sft is not None  # else the job has no such stage
    settings = {"sft": sft.model_dump(exclude={"data"}), "train": matter, "theta": theta.model_dump()}
    if theta.type == "adapter":
        settings["lora_targets"] = run.config.model.lora_targets
    work = _work(run.config, rows, "sft", sft.batch_size, sft.epochs)
    inputs = {"model": model, "rows": rows}
    stage = run.open(Stage("sft", never_built, settings, inputs, work, resumable=True), queued=True)
    if isinstance(stage, Artifact):
        return stage
    # In a thread, like the methods: in the main thread Ray Train replaces the handler of Ctrl-C for good.
    call = partial(_train, run, [stage], _name([stage]), {"sft": (None, Start(model, rows))})
    return run_parallel({"sft": call}, 1)["sft"]["sft"]


def train_methods(
    run: Run, starts: Mapping[str, Start], held_out: Artifact | None = None, suffix: str = ""
) -> dict[str, Artifact]:
    """Preference methods by their names in the configuration, each from a checkpoint on pairs; merged checkpoints.

    Methods share a group of workers, one after another: starting a group takes far longer than a small model's
    training. ``train.parallel_methods`` groups work side by side. ``suffix`` is for their stages' names.
    """
    config = run.config
    more = {} if held_out is None else {"held_out": held_out}
    stages = {
        name: run.open(
            Stage(
                f"method_{name}{suffix}",
                never_built,
                {
                    "method": method_identity(config.methods[name]),
                    "preference": config.preference.model_dump(),
                    "train": _identity(run),
                    "model": config.model.model_dump(exclude={"path", "adapter", "attention", "max_template_mismatch"}),
                },
                {"model": start.model, "pairs": start.rows} | more,
                _work(config, start.rows, name, config.preference.batch_size, config.preference.epochs),
                resumable=True,
            ),
            queued=True,
        )
        for name, start in starts.items()
    }
    by_stage = {f"method_{name}{suffix}": (name, start) for name, start in starts.items()}
    count = len(stages) if config.train.checkpoint.best else config.train.parallel_methods
    groups = [list(stages.values())[i::count] for i in range(count)]
    calls = {}
    for group in groups:
        pending = [stage for stage in group if isinstance(stage, OpenStage)]
        if pending:  # the name is made from all stages, finished ones too, so that a restart finds the same group
            calls[_name(group)] = partial(_train, run, pending, _name(group), by_stage, held_out)
    trained: dict[str, Artifact] = {}
    for closed in run_parallel(calls, config.train.parallel_methods).values():
        trained |= closed
    return {n: s if isinstance(s, Artifact) else trained[s.name] for n, s in stages.items()}


def _work(config: Config, rows: Artifact, trains: str, batch: int, epochs: int) -> Work:
    bound, sft = rows.max_rows, trains == "sft"
    read = reading(rows, config.train.max_length * (1 if sft else 2), epochs)
    what = "supervised fine-tuning" if sft else getattr(config.methods[trains], "loss", config.methods[trains].type)
    steps = "" if bound is None else f", at most {ceil(bound / batch) * epochs:,} steps"
    groups = 1 if sft else min(config.train.parallel_methods, len(config.methods))
    return worker_work(config, f"{what}{steps}", groups, trains, **read)


def _name(stages: Sequence[OpenStage | Artifact]) -> str:
    return group_name("".join(stage.digest for stage in stages))


def group_name(identity: str) -> str:
    """Return the name of a Ray Train run; it is unique, so that no other configuration resumes from its checkpoints."""
    return "train_" + hashlib.sha256(identity.encode()).hexdigest()[:16]


def _train(
    run: Run,
    stages: list[OpenStage],
    group: str,
    starts: Mapping[str, tuple[str | None, Start]],
    held_out: Artifact | None = None,
) -> dict[str, Artifact]:
    """Train stages one after another in one group of workers; those that finished count, even if a later one fails."""
    jobs = []
    for stage in stages:
        method, start = starts[stage.name]
        stage.counts.read = stage.counts.kept = start.rows.count
        key = f"{stage.name}_{stage.digest[:12]}"
        jobs.append(
            TrainJob(
                config=run.config,
                model=str(start.model.path),
                rows=start.rows,
                out=str(stage.scratch),
                key=key,
                method=method,
                held_out=held_out,
            )
        )
    closed = {}
    try:
        if all(job.finished for job in jobs):  # an earlier driver ended before it closed these stages
            for stage in stages:
                log(stage.name, TOLD["resume"])
            _forget(run, group)
        else:
            fit(run, jobs, [stage.name for stage in stages], group)
    finally:
        for stage, job in zip(stages, jobs, strict=True):
            if job.finished:
                result = json.loads((stage.scratch / RESULT).read_text())
                stage.counts.facts["restarts"] = sum(f["restart"] for f in failures_of(stage.scratch))
                stage.counts.facts["alarms"] = result.get("alarms", [])
                closed[stage.name] = run.close(stage, wall_s=result["wall_s"])
    return closed


def _forget(run: Run, group: str) -> None:
    """Delete the files that Ray Train keeps of a finished group, if there are any."""
    filesystem, folder = _folder(run, group)
    if filesystem.get_file_info(folder).type == FileType.Directory:
        filesystem.delete_dir(folder)


def _folder(run: Run, group: str) -> tuple[FileSystem, str]:
    """Return where Ray Train keeps a group's records and checkpoints: the file system, and the path there."""
    filesystem, storage = FileSystem.from_uri(_storage(run))
    return filesystem, f"{storage}/{group}"


def _storage(run: Run) -> str:
    """Return the folder or address where Ray Train keeps its records and checkpoints."""
    return run.config.train.checkpoint.storage or str(run.root / ".unfinished")


def _identity(run: Run) -> dict[str, Any]:
    """Return the training settings that change the results of a preference method."""
    checkpoint = run.config.train.checkpoint
    chosen = checkpoint.model_dump(include={"best", "every", "keep"}) if checkpoint.best else {"best": None}
    return run.config.train.model_dump(include=MATTER) | chosen


def fit(run: Run, jobs: list[TrainJob], names: list[str], group: str, *, from_files: bool = False) -> None:
    """Run the jobs of a group to their end; resume if an earlier driver has left a group of this name unfinished.

    With ``from_files`` the workers read rows from the stages' files instead of shared memory; this takes two processes
    less.

    Raises:
        UserError: the cluster has no room for the workers, or a worker refused a setting.
        RuntimeError: a worker failed, with the worker's own error as message; or the controller died too often.
    """
    config, use_gpu = run.config.train, uses_gpu(run.config)
    shared = [] if from_files else [artifact for job in jobs for artifact in (job.rows, job.held_out) if artifact]
    options: dict[str, Any] = {  # untyped: the environment decides which of Ray's two ScalingConfigs this is
        "scaling_config": ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": config.cpus_per_worker} | ({"GPU": 1.0} if use_gpu else {}),
            placement_strategy=config.placement,
        ),
        "torch_config": BoundTorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=int(config.timeout_s)),
        "run_config": RunConfig(**_run_options(run, jobs, group, {} if use_gpu else KEEP_MEMORY)),
        "datasets": {digest: dataset(artifact) for digest, artifact in {a.digest: a for a in shared}.items()},
        "dataset_config": DataConfig(datasets_to_split=[]),
    }
    _log_memory(jobs, names, "cuda" if use_gpu else "cpu")
    work = {"jobs": jobs, "from_files": from_files, "beats": watched()}
    with Follower(jobs, names, Trackers(run)):
        for left in reversed(range(config.max_failures + 1)):
            if mended := mend_checkpoints(*_folder(run, group)):
                warn(names[0], mended)
            try:
                TorchTrainer(train_loop, train_loop_config=work, **options).fit()
                break
            except TrainingFailedError as error:
                raise _explain(error, run.config) from error
            except RayActorError as error:  # Ray Train restarts workers, and nobody its controller
                record_failure([job.out for job in jobs], {CONTROLLER: text_of(error)}, restart=left > 0)
                if not left:
                    raise RuntimeError(f"Ray Train's controller died more than {config.max_failures} times") from error
    _forget(run, group)


def _log_memory(jobs: list[TrainJob], names: list[str], device: Device) -> None:
    """Log the largest memory estimate of the jobs; the workers compare theirs with their free memory."""
    estimates = {name: estimate_memory(job, device) for job, name in zip(jobs, names, strict=True)}
    largest = max(estimates, key=lambda name: estimates[name].total)
    log(largest, estimates[largest].sentence())


def _run_options(run: Run, jobs: list[TrainJob], group: str, environment: dict[str, str]) -> dict[str, Any]:
    """Return the arguments of Ray Train's RunConfig: storage, kept checkpoints, restarts."""
    config = run.config.train
    limits: dict[str, Any] = {"max_failures": config.max_failures, "controller_failure_limit": config.max_failures}
    kept: dict[str, Any] = {"num_to_keep": config.checkpoint.keep}
    if any(job.checkpoint.best for job in jobs):
        kept |= {"checkpoint_score_attribute": "score", "checkpoint_score_order": "max"}
    return {
        "name": group,
        "storage_path": _storage(run),
        "failure_config": FailureConfig(**limits),
        "checkpoint_config": CheckpointConfig(**kept),
        "callbacks": [ControllerCallback([job.out for job in jobs])],
        "worker_runtime_env": {"env_vars": environment},
    }


def _explain(error: TrainingFailedError, config: Config) -> Exception:
    """Return one clear error for an error of Ray Train."""
    cause = cause_of(error)
    if isinstance(error, WorkerGroupError):
        return RuntimeError(f"training worker {min(error.worker_failures)} failed: {cause}")
    if isinstance(cause, UserError):
        return cause
    if "StartupTimeout" in type(cause).__name__:
        return UserError(
            f"the cluster has no room for train.num_workers={config.train.num_workers} any more: bring nodes back, or "
            "lower it; the same command resumes from the newest checkpoint"
        )
    return RuntimeError(f"training failed: {cause}")
