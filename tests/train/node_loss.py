"""Two nodes on one machine with a worker each; one is lost in the middle of training, and replaced.

    python -m tests.train.node_loss OUTPUT ROWS [override ...]

Prints the seconds from the loss to the next step.
"""

import sys
import threading
import time
from pathlib import Path

from ray.cluster_utils import Cluster

from .interrupted import train

STEP = 5


def steps(log):
    return len(log.read_text().splitlines()) if log.exists() else 0


def wait(log, more_than):
    while steps(log) <= more_than:
        time.sleep(0.02)


def main(output, referenced, *overrides):
    import ray

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    spread = ["train.num_workers=2", "train.placement=STRICT_SPREAD"]
    driver = threading.Thread(target=train, args=(output, referenced, "methods", *spread, *overrides), daemon=True)
    driver.start()
    log = Path(output) / "quickstart" / ".unfinished" / "method_spo" / "log.jsonl"
    wait(log, STEP)
    before, lost = steps(log), time.time()
    cluster.remove_node(nodes[1], allow_graceful=False)
    cluster.add_node(num_cpus=1)  # works in the main thread only
    time.sleep(2)  # steps that were under way
    wait(log, max(before, steps(log)))
    print(f"RECOVERED {time.time() - lost:.1f} s after the loss", flush=True)
    driver.join()
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
