"""A driver that samples the toy model with vLLM, to be run and killed by the tests.

python -m tests.data.sampling OUTPUT QUESTIONS
"""

import sys


def main(output, questions):
    import ray

    from spo_ray.data.sample import SamplingJob, sample
    from spo_ray.data.sources import load_data
    from spo_ray.runtime.artifact import external
    from spo_ray.runtime.console import install
    from spo_ray.runtime.run import Run

    from ..helpers import small_config

    sizes = [f"data.train_questions={questions}", "sampling.samples=8", "sampling.batch_size=16", "engine.type=vllm"]
    install()
    run = Run(small_config(output, *sizes))
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    sample(
        run, "base_samples", SamplingJob.policy(run.config, external(run.config.model.path)), load_data(run, "train")
    )
    print("FINISHED", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
