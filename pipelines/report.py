"""Write the report, running what it needs first. Finished stages are reused.

python pipelines/report.py --config configs/quickstart.yaml [key=value ...]
"""

import sys

from pipelines.full import stages
from spo_ray.cli import script

if __name__ == "__main__":
    sys.exit(script(stages, "report", "Write the report, running what it needs first."))
