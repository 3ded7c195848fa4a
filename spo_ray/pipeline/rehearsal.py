"""A run that builds nothing: it goes through the job to find out which stages would be reused, and why others not."""

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from spo_ray.config.schema import Config
from spo_ray.errors import UserError
from spo_ray.runtime.artifact import Artifact
from spo_ray.runtime.run import OpenStage, Run, State

REPORT = "report"


class Rehearsal(Run):
    """Stages are given as if they were finished: a digest follows from settings and inputs alone."""

    only_rehearsed = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.found: dict[str, tuple[State, str]] = {}
        """By stage: what would happen to it, and for one that would be made again, why."""
        self.problem: str | None = None
        """Why the job would be refused."""

    def open(
        self, name: str, *, config: Mapping[str, Any], inputs: Mapping[str, Artifact], resumable: bool = False
    ) -> "Artifact | OpenStage":
        """Record what would happen; nothing is written."""
        identity, digest = self.identify(name, config, inputs)
        self.found[name] = self.state(name, identity, digest)
        return Artifact(self.root / name, digest)


def rehearse(config: Config, stages: Callable[[Run], Iterator[str]]) -> Rehearsal:
    """Follow the job up to its report, which needs results and is made again as soon as one of them is."""
    run = Rehearsal(config)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            for part in stages(run):
                if part == "evaluate":
                    break
    except UserError as error:
        run.problem = str(error)
        return run
    again = [name for name, (state, _) in run.found.items() if state != "reused"]
    made = (run.root / REPORT).is_dir()
    why = f"its input {again[0]} is another" if again and made else ""
    run.found[REPORT] = ("reused" if made and not again else "starts", why)
    return run
