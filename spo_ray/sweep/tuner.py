"""The trials of a sweep under Ray Tune: started, or gone on with after the driver was killed."""

import itertools
import json
import logging
import os
import random
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler

from spo_ray.cluster import engine_gpus
from spo_ray.config import Config
from spo_ray.data.sample import choose
from spo_ray.errors import UserError
from spo_ray.evaluate.actors import Evaluator
from spo_ray.progress import say
from spo_ray.run import Artifact, Run, write_json
from spo_ray.sweep.results import Progress, close_trials
from spo_ray.sweep.room import DRIVER, fitting_trials, prepares_itself, trial_room
from spo_ray.sweep.shared import Shared, prepare, run_for, shared_values
from spo_ray.sweep.space import distributions, listed_points, mutations, sweep_of, within
from spo_ray.sweep.trial import PROGRESS, Context, key_of, percent, trial
from spo_ray.sweep_config import Asha, LogUniform, OptunaSearch, Pbt, SweepConfig, mode_of, names_of

TUNE = "tune"
"""Ray Tune's own records, as long as the sweep is under way."""
ROOM = "room.json"
"""How many trials at a time it was started with; as long, too."""
KEPT_STATES = 4
"""Training states of a trial that others may take over (population-based training)."""
STARTS = ("sft", "pairs", "held_out", "validation")
NOT_RESULTS = {"keep", "max_concurrent"}


def starts(run: Run) -> dict[str, Shared]:
    """The trials' common starts, all that can be known before; finished stages are reused."""
    space = sweep_of(run.config).space
    finite = {key: d.values for key in shared_values(space) if not isinstance(d := space[key], LogUniform)}
    if prepares_itself(run.config):
        return {}
    found = {}
    for values in (dict(zip(finite, values, strict=True)) for values in itertools.product(*finite.values())):
        found[key_of(values)] = prepare(run_for(run, values))
    return found


def run_trials(run: Run, known: Mapping[str, Shared]) -> Artifact:
    """All trials, as one stage with a folder for each; the same command goes on with the unfinished ones."""
    config, sweep = run.config, sweep_of(run.config)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = trial_room(config, nodes)
    inputs = {f"{i}{name}": a for i, s in enumerate(known.values()) for name in STARTS if (a := getattr(s, name))}
    settings = {
        "sweep": sweep.model_dump(mode="json", exclude=NOT_RESULTS),
        "run": config.model_dump(mode="json", exclude={"name", "output", "ray", "sweep", "methods", "tracking"}),
        "method": config.methods[sweep.method].model_dump(mode="json"),
    }
    stage = run.open("trials", config=settings, inputs=inputs, resumable=True)
    if isinstance(stage, Artifact):
        return stage
    room = _room_of_start(config, stage.scratch, nodes, room)
    kind, _ = choose(config.engine)
    evaluators = _evaluators(config, kind)
    say("trials", f"{room} at a time")
    try:
        context = Context(run, stage.scratch, stage.digest, dict(known), evaluators, kind)
        results = _tuner(config, context, room).fit()
    finally:
        for actor in evaluators:
            ray.kill(actor)
    close_trials(run, stage, results)
    shutil.rmtree(stage.scratch / TUNE)
    (stage.scratch / ROOM).unlink(missing_ok=True)
    for leftover in (run.root / ".unfinished").glob("train_*"):  # of trainings that were ended with their trial
        shutil.rmtree(leftover)
    return run.close(stage)


def _room_of_start(config: Config, folder: Path, nodes: list[dict[str, Any]], room: int) -> int:
    """Trials at a time, which Ray Tune keeps from the first start on: ``room`` there, later what it was then.

    Raises:
        UserError: the cluster has room for fewer by now.
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
    """Actors that score the trials' checkpoints; Ray starts a killed one again, and repeats what it was doing."""
    options: dict[str, Any] = {"num_cpus": config.engine.cpus, "num_gpus": engine_gpus(config.engine)}
    remote: Any = ray.remote(max_restarts=-1, max_task_retries=-1, **options)(Evaluator)
    arguments = (kind, config.engine, config.model.chat_template)
    return [remote.remote(*arguments) for _ in range(config.engine.replicas)]


def _tuner(config: Config, context: Context, room: int) -> tune.Tuner:
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # each trial has its own log
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # by it Ctrl-C would end fit() as if all trials had ended
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    random.seed(config.seed)  # PBT draws from the global generators
    np.random.seed(config.seed)
    sweep = sweep_of(config)
    folder = context.folder / TUNE
    entry: Any = tune.with_resources(partial(trial, context=context), DRIVER)
    if tune.Tuner.can_restore(str(folder)):
        return tune.Tuner.restore(str(folder), trainable=entry, resume_unfinished=True)
    algorithm, space, samples = SEARCHERS[sweep.searcher.type](config)
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
            checkpoint_config=tune.CheckpointConfig(num_to_keep=KEPT_STATES),
            callbacks=[Progress(context.folder, sweep)],
            verbose=0,
        ),
    )


def _listed(config: Config) -> tuple[None, dict[str, Any], int]:
    """A list made in advance: the same trials whatever the number at a time."""
    points: list[Any] = listed_points(config)
    if sweep_of(config).scheduler.type == "pbt":  # where a trial takes over all of another's point
        points = [point | {"number": None} for point in points]
    return None, {"point": tune.grid_search(points)}, 1


def _suggested(config: Config) -> tuple[Any, dict[str, Any], int]:
    import optuna
    from ray.tune.search.optuna import OptunaSearch as RayOptuna

    sweep = sweep_of(config)
    assert isinstance(sweep.searcher, OptunaSearch)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=config.seed, n_startup_trials=sweep.searcher.startup_trials)
    space = {f"point/values/{key}": distribution for key, distribution in distributions(sweep).items()}
    modes: list[str] = [mode_of(objective) for objective in sweep.objectives]
    algorithm = RayOptuna(space=space, metric=names_of(sweep), mode=modes, sampler=sampler)
    return algorithm, {"point": {"number": None, "seed": sweep.seeds[0]}}, sweep.samples


SEARCHERS = {"random": _listed, "grid": _listed, "optuna": _suggested}


def _scheduler(sweep: SweepConfig) -> TrialScheduler:
    chosen, first = sweep.scheduler, percent(sweep.score_at[0])
    usual: dict[str, Any] = {"metric": names_of(sweep)[0], "mode": mode_of(sweep.objectives[0]), "time_attr": PROGRESS}
    if isinstance(chosen, Asha):
        rungs: Any = {"max_t": 100, "grace_period": first, "reduction_factor": chosen.reduction_factor}
        return ASHAScheduler(**usual, **rungs)
    if isinstance(chosen, Pbt):
        return PopulationBasedTraining(
            **usual,
            perturbation_interval=first,
            hyperparam_mutations={"point": {"values": mutations(sweep)}},
            quantile_fraction=chosen.quantile,
            resample_probability=chosen.resample,
            custom_explore_fn=partial(_clip, sweep=sweep),
        )
    return FIFOScheduler()


def _clip(config: dict[str, Any], sweep: SweepConfig) -> dict[str, Any]:
    return {"point": config["point"] | {"values": within(sweep, config["point"]["values"])}}
