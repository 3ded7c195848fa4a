"""Trains one method with checkpoints in an object store: ``python -m tests.train.object_store PAIRS OUT STORAGE``."""

import json
import sys
from pathlib import Path

import ray

from spo_ray.runtime.artifact import Artifact, external
from spo_ray.runtime.run import Run
from spo_ray.train.launch import train_methods
from spo_ray.train.spec import Start

from ..helpers import small_config


def main():
    pairs, out, storage = sys.argv[1:]
    checkpoint = f"{{every: 2, keep: 2, storage: '{storage}', best: {{metric: probe/logps/chosen, mode: min}}}}"
    rates = ["preference.theta.lr=3e-3", "preference.phi.lr=3e-3", "preference.probe_every=2"]
    config = small_config(out, *rates, f"train.checkpoint={checkpoint}", "preference.alarm.max_both_fell=null")
    run = Run(config.model_copy(update={"methods": {"dpo": config.methods["dpo"]}}))
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    start = Start(external("assets/toy_base"), Artifact(Path(pairs), "pairs"))
    artifact = train_methods(run, {"dpo": start})["dpo"]
    print("RESULT", (artifact.path / "result.json").read_text().replace("\n", " "))
    log = [json.loads(line) for line in (artifact.path / "log.jsonl").read_text().splitlines()]
    print("LOG", json.dumps({r["step"]: r["probe/logps/chosen"] for r in log if "probe/logps/chosen" in r}))


if __name__ == "__main__":
    main()
