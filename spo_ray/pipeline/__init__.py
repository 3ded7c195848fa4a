"""The whole job, its dry run, and the command line."""

from typing import Literal, get_args

Part = Literal["data", "sample", "sft", "pairs", "reference", "train", "evaluate", "report"]
PARTS: tuple[Part, ...] = get_args(Part)
"""The parts of a job, in their order."""
