"""The trials of a sweep under Ray Tune, and how many fit on the cluster at a time."""

import itertools
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from spo_ray.config.schema import Config
from spo_ray.config.sweep import LogUniform, SweepConfig, mode_of, names_of
from spo_ray.errors import EvaluatorLostError, UserError
from spo_ray.evaluate.actors import Evaluator
from spo_ray.model.completion import choose_engine
from spo_ray.runtime.artifact import Artifact, PlannedArtifact, write_json
from spo_ray.runtime.cluster import REPEATED, engine_gpus, uses_gpu
from spo_ray.runtime.console import log
from spo_ray.runtime.heartbeat import watched
from spo_ray.runtime.run import Run, Stage, Work, never_built, reading, times
from spo_ray.sweep.results import Progress, close_trials
from spo_ray.sweep.space import distributions, listed_points, run_for, shared_values, start_key, sweep_of, trial_count
from spo_ray.sweep.trial import PROGRESS, Context, percent, trial
from spo_ray.train.method_state import method_identity
from spo_ray.train.spec import Prepared

TUNE = "tune"
"""Folder with Ray Tune's own records while the sweep is running."""
ROOM = "room.json"
"""File with the number of trials at a time while the sweep is running."""
STARTS = {"pairs": "reference", "held_out": "held_out", "validation": "validation"}
"""Fields of :class:`Prepared` by the names of the trials' inputs, besides the checkpoint."""
NOT_RESULTS = {"keep", "max_concurrent"}
"""Fields of the section ``sweep`` that no score depends on."""
DRIVER = {"memory": 2.0**26}
"""Resources of a trial's own process, which mostly waits. Ray Tune needs some; parts of CPUs would leave no node with
a whole one for a worker."""
ROUNDING = 1e-9


def starts(run: Run, prepare: Callable[[Run], Prepared]) -> dict[str, Prepared]:
    """Return the starts that trials share, by :func:`start_key`; empty if every trial must make its own.

    ``prepare`` makes a start in the run that it is given.
    """
    space = sweep_of(run.config).space
    finite = {key: d.values for key in shared_values(space) if not isinstance(d := space[key], LogUniform)}
    if prepares_itself(run.config):
        return {}
    found: dict[str, Prepared] = {}
    for combination in itertools.product(*finite.values()):
        values = dict(zip(finite, combination, strict=True))
        if start_key(values) not in found:  # a dimension may list a value twice
            found[start_key(values)] = prepare(run_for(run, values))
    return found


def run_trials(run: Run, known: Mapping[str, Prepared], prepare: Callable[[Run], Prepared]) -> Artifact:
    """Run all trials as one stage with a folder for each, or resume the unfinished ones."""
    config, sweep = run.config, sweep_of(run.config)
    inputs = {
        f"{number}{name}": artifact
        for number, start in enumerate(known.values())
        for name, key in ({config.reference: "policy"} | STARTS).items()
        if (artifact := getattr(start, key))
    }
    settings = {
        "sweep": sweep.model_dump(mode="json", exclude=NOT_RESULTS),
        "run": config.model_dump(mode="json", exclude={"name", "output", "ray", "sweep", "methods", "tracking"}),
        "method": method_identity(config.methods[sweep.method]),
    }
    work = _work(config, known) if run.mode == "plan" else Work()
    stage = run.open(Stage("trials", never_built, settings, inputs, work, resumable=True))
    if isinstance(stage, Artifact):
        return stage
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = _room_of_start(config, stage.scratch, nodes, trial_room(config, nodes))
    kind, _ = choose_engine(config.engine)
    evaluators = _evaluators(config, kind)
    log("trials", f"{room} at a time")
    try:
        context = Context(run, prepare, stage.scratch, stage.digest, dict(known), evaluators, kind, watched())
        results = _tuner(config, context, room).fit()
    except tune.TuneError as error:  # Ray Tune's message is a traceback
        lost = error.__context__
        raise lost if isinstance(lost, EvaluatorLostError) else error from None
    finally:
        for actor in evaluators:
            ray.kill(actor)
    close_trials(run, stage, results)
    shutil.rmtree(stage.scratch / TUNE)
    (stage.scratch / ROOM).unlink(missing_ok=True)
    for leftover in (run.root / ".unfinished").glob("train_*"):  # Ray Train's records of stopped trials
        shutil.rmtree(leftover)
    return run.close(stage)


def _work(config: Config, known: Mapping[str, Prepared]) -> Work:
    sweep, trials = sweep_of(config), trial_count(config)
    pairs = [start.reference for start in known.values()]
    most = max(
        pairs, key=lambda rows: inf if rows.max_rows is None else rows.max_rows, default=PlannedArtifact(Path(), "")
    )
    read = reading(most, 2 * config.train.max_length, trials * config.preference.epochs)
    stops = ", ".join(f"{share:.0%}" for share in sweep.score_at)
    note = f"{trials} trials, scored after {stops} of their steps, scheduler {sweep.scheduler}"
    rows = times(most.max_rows, trials)
    return Work(rows, tokens=read["tokens"], lengths=most.lengths, trains=sweep.method, note=note)


def _room_of_start(config: Config, folder: Path, nodes: Sequence[Mapping[str, Any]], room: int) -> int:
    """Return the number of trials at a time: ``room``, or that of an earlier start, which Ray Tune keeps.

    Raises:
        UserError: the cluster has become too small for the earlier number.
    """
    file = folder / ROOM
    if not (file.exists() and tune.Tuner.can_restore(str(folder / TUNE))):
        write_json(file, {"trials_at_a_time": room})
        return room
    held, now = json.loads(file.read_text())["trials_at_a_time"], fitting_trials(config, nodes)
    if now < held:
        raise UserError(
            f"the sweep was started with {held} trials at a time, which it keeps, and the cluster now has room for "
            f"{now}: bring nodes back, raise ray.num_cpus on a local cluster, or delete {folder.parent} to begin again"
        )
    return held


def _evaluators(config: Config, kind: str) -> list[Any]:
    """Start the actors that score checkpoints; Ray repeats the call of an actor that dies, and restarts it up to
    three times the number of trials.
    """
    options: dict[str, Any] = {"num_cpus": config.engine.cpus, "num_gpus": engine_gpus(config.engine)}
    options |= REPEATED | {"max_restarts": REPEATED["max_restarts"] * trial_count(config)}
    remote: Any = ray.remote(**options)(Evaluator)
    arguments = (kind, config.engine, config.model, watched())
    return [remote.remote(*arguments) for _ in range(config.engine.replicas)]


def _tuner(config: Config, context: Context, room: int) -> tune.Tuner:
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # each trial has its own log
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # else fit() returns after Ctrl-C as if all trials had ended
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    sweep = sweep_of(config)
    folder = context.folder / TUNE
    entry: Any = tune.with_resources(partial(trial, context=context), DRIVER)
    if tune.Tuner.can_restore(str(folder)):
        return tune.Tuner.restore(str(folder), trainable=entry, resume_unfinished=True)
    algorithm, space, samples = _search(config)
    return tune.Tuner(
        entry,
        param_space=space,
        tune_config=tune.TuneConfig(
            search_alg=algorithm,
            scheduler=_scheduler(sweep),
            num_samples=samples,
            max_concurrent_trials=room,
            trial_dirname_creator=lambda trial: trial.trial_id,
            reuse_actors=True,  # importing what a trial needs takes far longer than starting a small one
        ),
        run_config=tune.RunConfig(
            name=TUNE,
            storage_path=str(context.folder),
            failure_config=tune.FailureConfig(max_failures=config.train.max_failures),
            callbacks=[Progress(context.folder, sweep)],
            verbose=0,
        ),
    )


STARTUP_TRIALS = 10
"""Random suggestions before TPE learns, as Optuna has it; of few samples only the first half."""


def _search(config: Config) -> tuple[Any, dict[str, Any], int]:
    """Return Ray Tune's search algorithm (None: a fixed list of trials), its search space and number of samples."""
    sweep = sweep_of(config)
    if sweep.searcher != "optuna":
        return None, {"point": tune.grid_search(listed_points(config))}, 1
    import optuna
    from ray.tune.search.optuna import OptunaSearch as RayOptuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=config.seed, n_startup_trials=min(STARTUP_TRIALS, sweep.samples // 2))
    space = {f"point/values/{key}": distribution for key, distribution in distributions(sweep).items()}
    modes: list[str] = [mode_of(objective) for objective in sweep.objectives]
    algorithm = RayOptuna(space=space, metric=names_of(sweep), mode=modes, sampler=sampler)
    return algorithm, {"point": {"number": None, "seed": sweep.seeds[0]}}, sweep.samples


def _scheduler(sweep: SweepConfig) -> TrialScheduler:
    usual: dict[str, Any] = {"metric": names_of(sweep)[0], "mode": mode_of(sweep.objectives[0]), "time_attr": PROGRESS}
    if sweep.scheduler == "asha":
        first = percent(sweep.score_at[0])
        rungs: Any = {"max_t": 100, "grace_period": first, "reduction_factor": sweep.reduction_factor}
        return ASHAScheduler(**usual, **rungs)
    return FIFOScheduler()


def trial_room(config: Config, nodes: Sequence[Mapping[str, Any]]) -> int:
    """Return the number of trials at a time: as many as fit, at most ``max_concurrent``.

    Raises:
        UserError: no trial fits.
    """
    count = fitting_trials(config, nodes)
    return min(count, sweep_of(config).max_concurrent or count)


def fitting_trials(config: Config, nodes: Sequence[Mapping[str, Any]]) -> int:
    """Return the number of trials that fit beside the evaluation actors, by the nodes' logical resources.

    Raises:
        UserError: no trial fits; Ray would wait forever.
    """
    train, engine = config.train, config.engine
    has_gpus = any(node.get("GPU") for node in nodes)
    gpus, beside = float(uses_gpu(config, has_gpus)), engine_gpus(engine, has_gpus)
    free = [{"CPU": node.get("CPU", 0.0), "GPU": node.get("GPU", 0.0)} for node in nodes]
    placed = all(_take(free, engine.cpus, beside) is not None for _ in range(engine.replicas))
    count = 0
    while placed and _take_trial(free, config, gpus):
        count += 1
    if not count:
        total = sum(node.get("CPU", 0.0) for node in nodes)
        raise UserError(
            f"too few resources: a trial needs {train.num_workers} workers of {train.cpus_per_worker:g} CPUs and "
            f"{gpus:g} GPUs ({train.placement}), beside {engine.replicas} evaluation actors of "
            f"{engine.cpus:g} CPUs and {beside:g} GPUs; the cluster has {total:g} CPUs on {len(nodes)} nodes: "
            "lower train.num_workers or engine.replicas, raise ray.num_cpus on a local cluster, or add nodes"
        )
    return count


def _take_trial(free: list[dict[str, float]], config: Config, gpus: float) -> bool:
    """Take the resources of one more trial from ``free``; return False if they are not there."""
    train, left = config.train, [dict(node) for node in free]
    used: list[int] = []
    for _ in range(train.num_workers):
        allowed = {"STRICT_PACK": used[:1] or None, "STRICT_SPREAD": [i for i in range(len(free)) if i not in used]}
        node = _take(left, train.cpus_per_worker, gpus, allowed.get(train.placement))
        if node is None:
            return False
        used.append(node)
    if prepares_itself(config) and _take(left, _preparing(config), 0.0) is None:
        return False
    free[:] = left
    return True


def _take(free: list[dict[str, float]], cpus: float, gpus: float, allowed: list[int] | None = None) -> int | None:
    """Take resources from the allowed node with most free CPUs; return its index, or None if none has enough."""
    for i in sorted(allowed if allowed is not None else range(len(free)), key=lambda i: -free[i]["CPU"]):
        if free[i]["CPU"] >= cpus - ROUNDING and free[i]["GPU"] >= gpus - ROUNDING:
            free[i]["CPU"] -= cpus
            free[i]["GPU"] -= gpus
            return i
    return None


def prepares_itself(config: Config) -> bool:
    """Return True if every trial must make its own start, because a log-uniform value changes it."""
    space = sweep_of(config).space
    return any(isinstance(space[key], LogUniform) for key in shared_values(space))


def _preparing(config: Config) -> float:
    """Return the CPUs that a trial needs for making its start, beyond those of its training."""
    train = config.train
    return max(0.0, config.engine.replicas * config.engine.cpus + 1.0 - train.num_workers * train.cpus_per_worker)
