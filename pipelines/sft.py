"""Sample, choose the SFT set and fine-tune. Finished stages are reused.

python pipelines/sft.py --config configs/quickstart.yaml [key=value ...]
"""

import sys

from pipelines.full import stages
from spo_ray.cli import script

if __name__ == "__main__":
    sys.exit(script(stages, "sft", "Sample, choose the SFT set and fine-tune."))
