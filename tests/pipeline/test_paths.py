"""Missing files are refused before anything heavy is imported; names on the hub by one request."""

import subprocess
import sys

import pytest
from huggingface_hub import constants

from spo_ray.config.load import load
from spo_ray.errors import UserError
from spo_ray.pipeline.paths import check_model_paths

from ..conftest import ROOT

HEAVY = ("torch", "transformers", "ray", "vllm", "openai", "scipy")


def test_what_is_missing_is_told_before_anything_heavy_is_imported(tmp_path):
    (tmp_path / "pairs.jsonl").write_text("{}")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "smollm2-135m").mkdir()
    base = f"model.path={ROOT}/assets/toy_base"
    asked = {
        ("data.path=pair.jsonl", base): "no data file pair.jsonl; did you mean pairs.jsonl?: set the path",
        ("data.path=pairs.jsonl", "model.path=models/smolm2-135m"): (
            f"no model in models/smolm2-135m (no config.json there, looked for in {tmp_path}); did you mean "
            "models/smollm2-135m?: set model.path to a directory or a hub id"
        ),
        ("data.path=pairs.jsonl", "model.path=assets/toy_base"): (
            f"there is no folder assets/toy_base in {tmp_path}, and no model of that name in the hub's cache"
        ),
    }
    code = f"""
import sys
from pathlib import Path
from spo_ray.pipeline import cli
for overrides in {list(asked)}:
    assert cli.run(*overrides, config=Path({str(ROOT / "configs" / "preferences.yaml")!r})) == 2
assert cli.run("configs/mine.yaml") == 2
print(sorted(set({HEAVY}) & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.strip() == "[]"
    *told, last = done.stderr.splitlines()
    assert [line.startswith(f"error: {text}") for line, text in zip(told, asked.values(), strict=True)] == [True] * 3
    assert last == "error: name the configuration with --config configs/mine.yaml: configs/ has examples"


def test_a_hub_that_does_not_answer_is_asked_once(in_root, monkeypatch):
    """The address is one at which nothing listens: tests have no hub."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
    config = load("configs/quickstart.yaml", ["model.path=absent/model"])
    with pytest.raises(UserError, match=r"there is no folder absent/model in .*, and the hub can't be reached: "):
        check_model_paths(config)
