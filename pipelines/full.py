"""Run the whole job, which is described in :mod:`spo_ray.pipeline.job`.

    python pipelines/full.py --config configs/quickstart.yaml [key=value ...]

Every stage has a folder under ``runs/NAME`` and is reused as long as everything that it depends on stays the same.
"""

from spo_ray.pipeline.cli import main

if __name__ == "__main__":
    main("run")
