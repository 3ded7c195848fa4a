"""A sweep's trials on a Ray cluster of their own, from the toy base and 21 pairs; to be run and killed by the tests.

    python -m tests.sweep.driver OUTPUT ROWS NODES [override ...]

ROWS holds reference log-probabilities; NODES are the nodes' logical CPUs, such as 4 or 2,2, or a cluster's address.
"""

import sys
from itertools import islice
from pathlib import Path

import ray

from spo_ray.config.load import load
from spo_ray.data.toy import problems
from spo_ray.pipeline.cli import guarded
from spo_ray.report.sweep import write_sweep_report
from spo_ray.runtime import schema
from spo_ray.runtime.artifact import Artifact, external, write_rows
from spo_ray.runtime.run import Run
from spo_ray.runtime.status import recorded
from spo_ray.sweep.results import rank, rows_of, write_best, write_csv
from spo_ray.sweep.space import start_key
from spo_ray.sweep.tuner import run_trials
from spo_ray.train.spec import Prepared

SMALL = [
    "engine.type=transformers",
    "eval.suites=[accuracy]",
    "preference.epochs=2",  # 12 steps of 3 or 4 pairs
    "preference.probe_pairs=16",
    "train.checkpoint.every=2",
    "sweep.score_at=[0.25, 0.5, 1.0]",
    "sweep.max_fall=null",
    "sweep.validation={questions: 12, pairs: 0}",
    "sweep.scheduler=fifo",
]


def small_run(output, *overrides):
    return Run(load("configs/sweeps/toy.yaml", [f"output={output}", *SMALL, *overrides]))


def start(output, referenced):
    """What trials start from: the toy base, the given pairs, which are the held-out ones too."""
    folder = Path(output) / "questions"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "part-0.parquet").exists():
        table = [
            {"id": f"{i:03d}", "prompt": p.question, "gold": p.solution}
            for i, p in enumerate(islice(problems("train", 7), 12))
        ]
        write_rows(folder / "part-0.parquet", table, schema.Prompt)
    pairs, questions = Artifact(Path(referenced), "referenced"), Artifact(folder, "questions")
    return pairs, questions


def sweep(output, referenced, *overrides):
    """On the cluster that is connected."""
    run = small_run(output, *overrides)
    with run.locked(), recorded(run):
        return _stages(run, output, referenced)


def prepared(run, pairs, questions):
    found = Prepared(run.config, held_out=pairs, validation=questions)
    found.policy, found.reference, found.test = external("assets/toy_base"), pairs, questions
    return found


def prepare(run):
    raise AssertionError("the only start is known")


def _stages(run, output, referenced):
    pairs, questions = start(output, referenced)
    trials = run_trials(run, {start_key({}): prepared(run, pairs, questions)}, prepare)
    write_csv(run.root / "results.csv", rows_of(trials), run.config.sweep)
    best = rank(rows_of(trials), run.config.sweep)[0]
    write_best(run, best)
    write_sweep_report(run, trials, best)
    print("FINISHED", flush=True)
    return run, trials


def main(output, referenced, nodes, *overrides):
    if ":" in nodes:
        ray.init(address=nodes, log_to_driver=False)
        sweep(output, referenced, *overrides)
        return
    cpus = [int(count) for count in nodes.split(",")]
    if len(cpus) == 1:
        ray.init(address="local", num_cpus=cpus[0], include_dashboard=False, log_to_driver=False)
        sweep(output, referenced, *overrides)
        return
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus[0], "include_dashboard": False})
    for count in cpus[1:]:
        cluster.add_node(num_cpus=count)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    sweep(output, referenced, *overrides)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(*sys.argv[1:])))
