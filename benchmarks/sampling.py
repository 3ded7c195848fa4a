"""The sampling stage against vLLM by itself: generated tokens per second on the same prompts, once warm.

    python -m benchmarks.sampling [--questions N] [--batch-size B] [--cpus C] [--repeats R]

Raw: one process gives vLLM all prompts at once. Stage: Ray Data and one engine actor, in batches that are written as
they finish. Either is timed from the end of the first batch on, with sampling settings and engine arguments alike, and
with as many threads: Ray gives an actor ``engine.cpus`` of them, a process by itself would take all there are.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import ray
import ray.data

from spo_ray.config.load import load
from spo_ray.config.schema import Config
from spo_ray.data.sample import SamplingJob, row_seed, sample
from spo_ray.data.sources import load_data
from spo_ray.runtime.artifact import external
from spo_ray.runtime.run import Run

ROOT = Path(__file__).resolve().parents[1]


def raw(config: Config, prompts: list[str], results: Any) -> None:
    """Tokens per second of one call for all prompts but the first batch, which warms up."""
    from spo_ray.model.engines import VllmEngine
    from spo_ray.model.tokenizer import ChatTokenizer

    chat = ChatTokenizer.load(config.model.path)
    engine = VllmEngine(config.model.path, config.engine, chat)
    sampling, size = config.sampling, config.sampling.batch_size

    def generate(texts: list[str]) -> int:
        answers = engine.generate(
            [chat.prompt_ids(text) for text in texts],
            n=sampling.samples,
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            seeds=[row_seed(text) for text in texts],
        )
        return sum(completion.tokens for completions in answers for completion in completions)

    generate(prompts[:size])
    started = time.perf_counter()
    tokens = generate(prompts[size:])
    results.put(tokens / (time.perf_counter() - started))


def staged(config: Config, name: str) -> float:
    """Tokens per second between the writing of the first and the last part."""
    run = Run(config.model_copy(update={"name": name}))
    made = sample(run, "base_samples", SamplingJob.policy(config, external(config.model.path)), load_data(run, "train"))
    times = sorted((Path(part).stat().st_mtime, part) for part in made.parts)
    columns = [pq.read_table(part, columns=["sample_tokens"])["sample_tokens"] for _, part in times[1:]]
    tokens = sum(sum(row) for column in columns for row in column.to_pylist())
    return tokens / (times[-1][0] - times[0][0])


def main() -> None:
    """Print both, in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sizes = [f"data.train_questions={options.questions}", f"sampling.batch_size={options.batch_size}"]
        engine = ["engine.type=vllm", f"engine.cpus={options.cpus}"]
        config = load(ROOT / "configs" / "quickstart.yaml", [f"output={folder}", *engine, *sizes])
        prompts = [row["prompt"] for row in load_data(Run(config), "train").rows()]
        context = multiprocessing.get_context("spawn")
        speeds: dict[str, list[float]] = {"raw": [], "stage": []}
        for repeat in range(options.repeats):
            results = context.Queue()
            process = context.Process(target=raw, args=(config, prompts, results))
            os.environ["OMP_NUM_THREADS"] = str(options.cpus)
            process.start()
            del os.environ["OMP_NUM_THREADS"]
            speeds["raw"].append(results.get())
            process.join()
            ray.init(address="local", num_cpus=options.cpus + 1, include_dashboard=False, log_to_driver=False)
            ray.data.DataContext.get_current().enable_progress_bars = False
            speeds["stage"].append(staged(config, f"repeat{repeat}"))
            ray.shutdown()
            print(f"raw {speeds['raw'][-1]:.0f}, stage {speeds['stage'][-1]:.0f} tokens/s", flush=True)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    print(f"medians: raw {medians['raw']:.0f}, stage {medians['stage']:.0f} tokens/s: "
          f"{medians['stage'] / medians['raw']:.1%}")  # fmt: skip


if __name__ == "__main__":
    main()
