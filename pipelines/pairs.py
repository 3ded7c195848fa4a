"""Everything up to the preference pairs. Finished stages are reused.

python pipelines/pairs.py --config configs/quickstart.yaml [key=value ...]
"""

import sys

from pipelines.full import stages
from spo_ray.cli import script

if __name__ == "__main__":
    sys.exit(script(stages, "pairs", "Everything up to the preference pairs."))
