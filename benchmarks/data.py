"""The row-wise data path: rows per second and memory of grading and pairing, with 1, 2 and 4 tasks at a time.

    python -m benchmarks.data [--rows N]

Synthetic questions with 8 samples each go through the stages of a real run on a local Ray cluster. A row is one
question. Memory is what no other process shares (USS), the highest of any Ray worker and of the driver.
"""

import argparse
import random
import tempfile
import threading
import time
from pathlib import Path

import psutil
import ray
import ray.data

from spo_ray.config.load import load
from spo_ray.data.grade import ROWS_PER_SHARD, grade_samples
from spo_ray.data.pairs import pair_samples
from spo_ray.runtime import schema
from spo_ray.runtime.artifact import Artifact, write_rows
from spo_ray.runtime.run import Run

ROOT = Path(__file__).resolve().parents[1]
SAMPLES, SENTENCE = 8, "She adds {} and {} with great care and finds that it is some number. "


def synthetic(folder: Path, count: int) -> Artifact:
    """Questions of some 40 words, answers of some 60 that are right half of the time."""
    rng = random.Random(0)
    for start in range(0, count, ROWS_PER_SHARD):
        table = []
        for i in range(start, min(count, start + ROWS_PER_SHARD)):
            a, b = rng.randrange(1000), rng.randrange(1000)
            texts = [SENTENCE.format(a, b) * 4 + f"\n#### {a + b + rng.randrange(2)}" for _ in range(SAMPLES)]
            gold = f"{a} + {b} = {a + b}.\n#### {a + b}"
            table.append(
                {
                    "id": f"q{i:07d}",
                    "prompt": SENTENCE.format(a, b) * 3,
                    "gold": gold,
                    "seed": i,
                    "prompt_ids": [1] * 80,
                }
                | {"responses": [gold], "response_sources": ["gold"], "samples": texts}
                | {"sample_logps": [-1.0] * SAMPLES, "sample_tokens": [60] * SAMPLES, "finished": [True] * SAMPLES}
            )
        write_rows(folder / f"part-{start:07d}.parquet", table, schema.Samples)
    return Artifact(folder, f"synthetic {count}")


class Watch(threading.Thread):
    """The highest memory of Ray's workers, and of this process, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.worker, self.driver, self.ended = 0, 0, threading.Event()

    def run(self) -> None:
        own = psutil.Process()
        while not self.ended.wait(0.2):
            self.driver = max(self.driver, own.memory_full_info().uss)
            for process in own.children(recursive=True):
                try:
                    if process.cmdline()[0].startswith("ray::"):
                        self.worker = max(self.worker, process.memory_full_info().uss)
                except (psutil.Error, IndexError):
                    continue


def measure(source: Artifact, count: int, tasks: int, folder: Path) -> tuple[float, float, float]:
    """Rows per second through both stages, and the highest memory in MiB of workers and driver."""
    ray.init(address="local", num_cpus=tasks, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    run = Run(load(ROOT / "configs" / "quickstart.yaml", [f"output={folder}", f"name=tasks{tasks}"]))
    watch = Watch()
    watch.start()
    started = time.perf_counter()
    pairs = pair_samples(run, "pairs", grade_samples(run, "sft_scores", source))
    wall = time.perf_counter() - started
    watch.ended.set()
    ray.shutdown()
    read = pairs.manifest["rows"]["read"]
    assert read == count, f"{read} of {count} rows"
    return count / wall, watch.worker / 2**20, watch.driver / 2**20


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in").mkdir()
        source = synthetic(folder / "in", arguments.rows)
        print(f"{arguments.rows} rows, {psutil.cpu_count()} cores")
        print("| tasks | rows/s | ratio | highest worker, MiB | driver, MiB |")
        first = 0.0
        for tasks in (1, 2, 4):
            speed, worker, driver = measure(source, arguments.rows, tasks, folder)
            first = first or speed
            print(f"| {tasks} | {speed:.0f} | {speed / first:.2f} | {worker:.0f} | {driver:.0f} |", flush=True)


if __name__ == "__main__":
    main()
