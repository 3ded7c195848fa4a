"""The whole job; its stages stand in :mod:`spo_ray.pipeline.job`.

    python pipelines/full.py --config configs/quickstart.yaml [key=value ...]

Every stage lands in a folder of its own under ``runs/NAME`` and is reused as long as what it depends on stays the same.
"""

import sys

from spo_ray.pipeline.cli import script
from spo_ray.pipeline.job import stages

if __name__ == "__main__":
    sys.exit(script(stages, "report", "The whole job, from sampling to the report."))
