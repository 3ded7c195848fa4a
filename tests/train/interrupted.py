"""A driver that trains on a Ray cluster of its own, to be run and killed by the tests.

    python -m tests.train.interrupted OUTPUT ROWS STAGES [override ...]

STAGES is ``methods``, or ``all`` for SFT before, on the rows in ``sft_rows`` beside ROWS.
"""

import sys
from pathlib import Path

METHOD = (
    "methods.spo={type: spo, base: {type: alpha_dpo}, safe_region: {epsilon: 0.01, lr: 1.0}, gamma: 0.1, "
    "inner: {steps: 1, eta: 1e-3}}"
)
OVERRIDES = ["train.checkpoint.every=3", "preference.epochs=2", "sft.epochs=2", METHOD]


def train(output, referenced, stages, *overrides):
    """On the cluster that is connected."""
    from spo_ray.runtime.artifact import Artifact, external
    from spo_ray.runtime.run import Run
    from spo_ray.train.launch import train_methods, train_sft
    from spo_ray.train.spec import Start

    from ..helpers import small_config

    run = Run(small_config(output, *OVERRIDES, *overrides))
    rows, base = Path(referenced), external(run.config.model.path)
    if stages == "all":
        train_sft(run, base, Artifact(rows.with_name("sft_rows"), "sft_rows"))
    train_methods(run, dict.fromkeys(run.config.methods, Start(base, Artifact(rows, "referenced"))))
    print("FINISHED", flush=True)


def main(*arguments):
    from spo_ray.runtime.cluster import start_local
    from spo_ray.runtime.console import install
    from spo_ray.runtime.heartbeat import BEATS, Watch

    install()
    start_local(300.0, num_cpus=4, include_dashboard=False, log_to_driver=False)
    with Watch(Path(arguments[0]) / BEATS):
        train(*arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
