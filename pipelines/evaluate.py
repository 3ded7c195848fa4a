"""Everything up to the evaluation. Finished stages are reused.

python pipelines/evaluate.py --config configs/quickstart.yaml [key=value ...]
"""

import sys

from pipelines.full import stages
from spo_ray.cli import script

if __name__ == "__main__":
    sys.exit(script(stages, "evaluate", "Everything up to the evaluation."))
