"""What Ray Train should do about failed workers: restart them, unless a restart would meet the same error again."""

import json
import time
from pathlib import Path
from typing import Any

from ray.train import UserCallback

from spo_ray.errors import TrainingError, UserError
from spo_ray.redact import redact
from spo_ray.run import read_lines
from spo_ray.train.job import RESULT

FAILURES = "failures.jsonl"
"""In a job's folder: one line for every time that its workers failed."""
FATAL = (TrainingError, UserError, TypeError, ValueError, KeyError, AttributeError, IndexError, ImportError)


class RecordFailures(UserCallback):
    """Write failures down where the driver and the report find them; end the run on an error of the program's own."""

    def __init__(self, folders: list[str]) -> None:
        self.folders = folders

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
        """See :class:`ray.train.UserCallback`; runs in Ray Train's controller."""
        causes = {rank: cause_of(error) for rank, error in worker_exceptions.items()}
        fatal = next((cause for cause in causes.values() if isinstance(cause, FATAL)), None)
        record = {
            "time": time.time(),
            "errors": {rank: redact(f"{type(cause).__name__}: {str(cause)[:500]}") for rank, cause in causes.items()},
            "restart": fatal is None,
        }
        for folder in map(Path, self.folders):
            if not (folder / RESULT).exists():  # the job that was under way
                with (folder / FAILURES).open("a") as file:
                    file.write(json.dumps(record) + "\n")
                break
        if fatal is not None:
            raise fatal


def failures_of(folder: Path) -> list[dict[str, Any]]:
    """What was written down about a job."""
    return read_lines(folder / FAILURES)


def cause_of(error: BaseException) -> BaseException:
    """The exception that a worker's code raised, without what Ray wraps around it."""
    for name in ("_base_exc", "controller_failure"):
        inner = getattr(error, name, None)
        if isinstance(inner, BaseException):
            return cause_of(inner)
    return error
