"""Everything up to the reference log-probabilities. Finished stages are reused.

python pipelines/reference.py --config configs/quickstart.yaml [key=value ...]
"""

import sys

from pipelines.full import stages
from spo_ray.cli import script

if __name__ == "__main__":
    sys.exit(script(stages, "reference", "Everything up to the reference log-probabilities."))
