"""The report's sections on the paper's probing experiments, where a run has finished them."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from spo_ray.probe import FORECAST, GROUPS, MASS_PANEL, PANELS
from spo_ray.report import html
from spo_ray.report.figures import probe_figure
from spo_ray.run import MANIFEST, Artifact, Run

PROBES = {
    "probe_dynamics": ("Probe: learning dynamics at every step", PANELS),
    "probe_mass_shift": ("Probe: where the probability of one question's answers goes", {MASS_PANEL: list(GROUPS)}),
}
SUFFIXES = {"probe_dynamics": "_probe", "probe_mass_shift": "_probe_mass"}
"""Of their trainings' stages."""


def finished_probes(run: Run) -> dict[str, Artifact]:
    """The run's probes by their stages; those of an SFT checkpoint that was made again since are left out."""
    found, sft = {}, _manifest(run, "sft")["digest"]
    for name, suffix in SUFFIXES.items():
        manifest = _manifest(run, name)
        trained = [(_manifest(run, f"method_{key}{suffix}"), digest) for key, digest in manifest["inputs"].items()]
        current = all(m["digest"] == digest and m["inputs"].get("model") == sft for m, digest in trained)
        if trained and current:
            found[name] = Artifact(run.root / name, manifest["digest"])
    return found


def _manifest(run: Run, stage: str) -> dict[str, Any]:
    file = run.root / stage / MANIFEST
    return json.loads(file.read_text()) if file.exists() else {"digest": "", "inputs": {}}


def probe_sections(run: Run, probes: Mapping[str, Artifact]) -> Iterator[str]:
    """Their figures, and what they found in figures."""
    for name, artifact in probes.items():
        title, panels = PROBES[name]
        yield f"<h2>{title}</h2>"
        series = json.loads((artifact.path / "series.json").read_text())
        for axis, curves in panels.items():
            yield html.figure(probe_figure(series, curves, axis))
        found = artifact.manifest["facts"]["summary"]
        columns = list(dict.fromkeys(key for entry in found.values() for key in entry))
        cells = [[_cell(key, entry.get(key)) for key in columns] for entry in found.values()]
        link = html.link("series.json", f"../{name}/series.json")
        yield html.table(["", *columns], [[method, *line] for method, line in zip(found, cells, strict=True)])
        said = "Changes from the first to the last step, in nats; forecasts: share of the steps with the right sign."
        yield html.note(html.Html(f"{said} {link} has them all."))
        if name == "probe_mass_shift":
            yield from _question(run)


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0%}" if key.startswith(FORECAST) else f"{value:+.3g}"


def _question(run: Run) -> Iterator[str]:
    facts = Artifact(run.root / "probe_mass_pairs", "").manifest["facts"]
    yield html.note(f"The question: {facts['question']} The most probable response, y*, is in no pair: {facts['y*']}")
