"""Run the whole job; its stages stand in :mod:`spo_ray.pipeline.job`.

    python pipelines/full.py --config configs/quickstart.yaml [key=value ...]

Every stage lands in a folder of its own under ``runs/NAME`` and is reused as long as what it depends on stays the same.
"""

from spo_ray.pipeline.cli import main

if __name__ == "__main__":
    main("run")
