"""What watching costs at its default intervals, as a share of a DPO step and of an SPO step.

    python -m benchmarks.watching [--steps 10]

The model and the GSM8K pairs of the other benchmarks, 4 pairs a step, all in one process: plain steps (collating,
gradients, clipping, AdamW), steps with learning dynamics, and every other measurement by itself, in turns.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from benchmarks import common
from benchmarks.step_cost import BETA, ETA, PAIRS, make_policy
from spo_ray.config.train import PreferenceConfig, TrainConfig
from spo_ray.core.spo import spo_gradients
from spo_ray.model.collate import collate_pairs
from spo_ray.model.optimizer import Group, make_optimizer
from spo_ray.model.tokenizer import ChatTokenizer
from spo_ray.train.callbacks import HEALTH_PROMPTS, HEALTH_TOKENS, DynamicsCallback
from spo_ray.train.data_loader import RowTable
from spo_ray.train.distributed import Distributed
from spo_ray.train.generation import text_health
from spo_ray.train.logp_eval import Measure
from spo_ray.train.loop import StepLog, clip, take_step

KINDS: dict[str, dict[str, Any]] = {
    "DPO": {"lambda_sft": 0.0, "gamma": 0.0, "inner_steps": 0},
    "SPO": {"lambda_sft": 1.0, "gamma": 0.0, "inner_steps": 1},
}
TEMPLATE = "{% for m in messages %}{{ m['content'] }}<eos>{% endfor %}"


class Bench:
    """A policy in training."""

    def __init__(self, settings: PreferenceConfig) -> None:
        self.settings, self.rank = settings, Distributed(0, 1, torch.device("cpu"))
        problems = common.gsm8k()
        tokenizer = common.make_tokenizer(problems)
        tokenizer.chat_template = TEMPLATE
        self.chat = ChatTokenizer(tokenizer)
        pairs = common.tokenised(common.make_pairs(problems, 64), tokenizer)
        self.rows, self.table = pairs, RowTable(pa.Table.from_pylist(pairs))
        self.model, self.backbone, self.adapters = make_policy()
        named = dict(self.model.named_parameters())
        groups = (("theta", self.backbone, settings.theta), ("phi", self.adapters, settings.phi))
        self.groups = [Group(name, {n: named[n] for n in names}, config) for name, names, config in groups]
        self.optimizer = make_optimizer(self.groups, "adamw")
        self.measure = Measure(self.model, self.chat, TrainConfig(), self.rank)
        self.params = [named[n] for n in (*self.backbone, *self.adapters)]

    def step(self, kind: str, number: int, watched: bool) -> None:
        """One step on the next pairs."""
        watch = DynamicsCallback(self.params, 1 if watched else None, self.measure, self.table)
        indices = [(number * PAIRS + i) % len(self.rows) for i in range(PAIRS)]
        grads, metrics = spo_gradients(
            self.model,
            collate_pairs(self.table.rows(indices), self.chat.pad_id),
            backbone=self.backbone,
            adapters=self.adapters,
            beta=BETA,
            eta=ETA,
            **KINDS[kind],
            side_gradients=watch.on_step_begin(1),
        )
        clip(self.groups, grads)
        take_step(self.optimizer, self.groups, grads)
        watch.on_step_end(metrics, indices)

    def probe(self) -> None:
        """Log-probabilities of the probe pairs."""
        self.measure.pair_means(self.table, range(self.settings.probe_pairs))

    def health(self) -> None:
        """Sampled answers."""
        asked = self.table.rows(range(HEALTH_PROMPTS))
        text_health(self.measure, asked, HEALTH_TOKENS, 0)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    steps = parser.parse_args().steps
    torch.set_num_threads(common.THREADS)
    settings = PreferenceConfig()
    bench = Bench(settings)
    with tempfile.TemporaryDirectory() as folder:
        log, record = StepLog(Path(folder) / "log.jsonl", bench.rank), {f"metric/{i}": 1.0 / (i + 3) for i in range(40)}
        calls: dict[str, Callable[[int], Any]] = {"log line": lambda i: log.write(record)}
        for kind in KINDS:
            calls[kind] = lambda i, k=kind: bench.step(k, i, False)
            calls[f"{kind}, watched"] = lambda i, k=kind: bench.step(k, i, True)
        calls |= {"probe": lambda i: bench.probe(), "text": lambda i: bench.health()}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
        for i in range(steps + 1):  # the first warms up
            for name, call in calls.items():
                times[name].append(common.elapsed(lambda c=call, n=i: c(n)))
    show({name: values[1:] for name, values in times.items()}, settings)


def show(times: dict[str, list[tuple[float, float]]], settings: PreferenceConfig) -> None:
    """Medians, and what they come to per step."""
    assert settings.probe_every and settings.dynamics_every and settings.health_every
    for clock, unit in enumerate(("wall", "CPU")):
        median = {name: statistics.median(value[clock] for value in values) for name, values in times.items()}
        print(f"{unit} seconds: " + ", ".join(f"{name} {value:.4f}" for name, value in median.items()))
        for kind in KINDS:
            parts = {
                "probe": median["probe"] / settings.probe_every,
                "dynamics": (median[f"{kind}, watched"] - median[kind]) / settings.dynamics_every,
                "text": median["text"] / settings.health_every,
                "log": median["log line"],
            }
            shares = ", ".join(f"{name} {part / median[kind]:.2%}" for name, part in parts.items())
            print(f"  share of a step of {kind}: {sum(parts.values()) / median[kind]:.2%} ({shares})")


if __name__ == "__main__":
    main()
