"""Run a sweep, which is described in :mod:`spo_ray.pipeline.sweep_job`.

python pipelines/sweep.py --config configs/sweeps/toy.yaml [key=value ...]
"""

from spo_ray.pipeline.cli import main

if __name__ == "__main__":
    main("sweep")
