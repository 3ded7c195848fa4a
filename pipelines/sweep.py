"""A sweep; its stages stand in :mod:`spo_ray.pipeline.sweep_job`.

python pipelines/sweep.py --config configs/sweeps/toy.yaml [key=value ...]
"""

import sys

from spo_ray.pipeline.cli import script
from spo_ray.pipeline.sweep_job import stages
from spo_ray.pipeline.sweep_outline import sweep_outline

if __name__ == "__main__":
    sys.exit(script(stages, "report", "A sweep, from the shared stages to the sensitivity report.", sweep_outline))
