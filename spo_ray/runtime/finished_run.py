"""Finished runs: their stages as they are on disk."""

from pathlib import Path

from spo_ray.config.schema import Config
from spo_ray.errors import UserError
from spo_ray.runtime.artifact import Artifact, MissingArtifact, changed_files
from spo_ray.runtime.manifest import MANIFEST, UnreadableError, read_manifest, some_of
from spo_ray.runtime.run import Run, Stage


class FinishedRun(Run):
    """A finished run that is read from its folder, which may have been moved; builds nothing."""

    mode = "read"

    def __init__(self, config: Config, root: Path, *, verify: bool = False) -> None:
        super().__init__(config, verify=verify)
        self.root = root.resolve()

    def open(self, stage: Stage, *, queued: bool = False) -> Artifact:
        """Return a stage as it is on disk; if it is missing, an artifact that raises an error when it is read.

        Raises:
            UserError: the stage is unreadable or damaged, leads out of the run's folder, or is older than one of its
                inputs.
        """
        folder = self.root / stage.name
        try:
            manifest = read_manifest(folder)
        except UnreadableError as error:
            raise UserError(self._unfinished(str(error))) from error
        if manifest is None:
            return MissingArtifact(folder, "", self._unfinished(f"it has no stage {stage.name}"))
        if manifest["stage"] != stage.name:
            raise UserError(f"{folder / MANIFEST} is the manifest of {manifest['stage']!r}: it is not read")
        for path in (folder, *folder.iterdir()):
            try:
                inside = path.resolve(strict=True).is_relative_to(self.root)
            except (OSError, RuntimeError) as error:  # a link to itself, or to nothing
                raise UserError(self._unfinished(f"{stage.name}/{path.name} can't be read")) from error
            if not inside:
                raise UserError(f"{path} leads out of the run's folder, to {path.resolve()}: it is not followed")
        own = {k: a for k, a in stage.inputs.items() if a.path.is_relative_to(self.root)}
        if any(manifest["inputs"].get(k) != a.digest for k, a in own.items() if not isinstance(a, MissingArtifact)):
            raise UserError(self._unfinished(f"{stage.name} is older than what it was made from"))
        if changed := changed_files(folder, manifest["files"], self.verify):
            raise UserError(self._unfinished(some_of(changed)))
        return Artifact(folder, manifest["digest"])

    def _unfinished(self, why: str) -> str:
        return f"{self.root} is not finished, {why}: run it again, finished stages are reused"
