"""A driver that trains on a Ray cluster of its own, to be run and killed by the tests.

    python -m tests.train.interrupted OUTPUT ROWS STAGES [override ...]

STAGES is ``methods``, or ``all`` for SFT before. With ``nodes``, workers are spread over two nodes of a local cluster.
"""

import sys
import threading
from pathlib import Path

METHOD = (
    "methods.spo={type: spo, base: alpha_dpo, safe_region: {epsilon: 0.01, lr: 1.0}, gamma: 0.1, "
    "inner: {steps: 1, eta: 1e-3}}"
)
OVERRIDES = ["train.checkpoint.every=3", "preference.epochs=2", "sft.epochs=2", METHOD]


def main(output: str, referenced: str, stages: str, *overrides: str) -> None:
    import ray

    from spo_ray.run import Artifact, Run, external
    from spo_ray.train.launch import train_methods, train_sft
    from tests.helpers import small_config

    if "RAY_ADDRESS" in __import__("os").environ:
        ray.init(log_to_driver=False)
    else:
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    run = Run(small_config(output, *OVERRIDES, *overrides))
    rows, base = Artifact(Path(referenced), "referenced"), external("assets/toy_base")
    if stages == "all":
        sft = Path(referenced).with_name("sft_rows")
        train_sft(run, base, Artifact(sft, "sft_rows"))
    train_methods(run, base, rows)
    print("FINISHED", flush=True)


if __name__ == "__main__":
    worker = threading.Thread(target=main, args=sys.argv[1:], daemon=True)
    worker.start()
    worker.join()
