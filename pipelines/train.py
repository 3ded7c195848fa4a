"""Everything up to the trained methods. Finished stages are reused.

python pipelines/train.py --config configs/quickstart.yaml [key=value ...]
"""

import sys

from pipelines.full import stages
from spo_ray.cli import script

if __name__ == "__main__":
    sys.exit(script(stages, "train", "Everything up to the trained methods."))
