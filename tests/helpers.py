"""Small configurations for tests that run the real thing."""

from spo_ray.config.load import load

SMALL = [
    "data.train_questions=48",
    "data.test_questions=16",
    "sampling.samples=4",
    "sft.epochs=1",
    "preference.epochs=1",
    "preference.probe_every=4",
    "train.parallel_methods=1",
    "eval.seeds=[0]",
]


def small_config(output, *overrides):
    """The quickstart on 48 questions, with DPO and SPO alone unless overridden."""
    config = load("configs/quickstart.yaml", [f"output={output}", *SMALL, *overrides])
    methods = {name: config.methods[name] for name in ("dpo", "spo") if name in config.methods}
    return config.model_copy(update={"methods": methods})
