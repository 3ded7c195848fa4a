"""Finished runs that are read back: on another machine, and after a change of settings."""

import importlib.util
import json
import sys

import pytest

from spo_ray.errors import UserError
from spo_ray.pipeline.finished import read_finished

from ..report.made_up import made_up_run

RIGHTS = {"base": 2, "sft": 6, "spo": 12}


@pytest.fixture
def folder(in_root, tmp_path):
    return made_up_run(tmp_path, "a", RIGHTS)


def configure(folder, change):
    file = folder / "config.json"
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))


def test_a_run_is_read_without_vllm_and_without_importing_its_verifier(folder, tmp_path, monkeypatch):
    (tmp_path / "own_rules.py").write_text("raise AssertionError('code of a finished run was executed')")
    monkeypatch.syspath_prepend(tmp_path)

    def change(tree):
        questions = {"type": "questions", "path": "elsewhere", "verifier": "own_rules:Verifier"}
        engine = {"type": "vllm"}
        teacher = {"model": "some/teacher", "engine": engine, "sampling": {"samples": 1, "max_tokens": 64}}
        tree.update(data=questions, engine=tree["engine"] | engine, sft_data=tree["sft_data"] | {"teachers": [teacher]})

    configure(folder, change)
    without_vllm = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else without_vllm(name))
    found = read_finished(folder)
    assert set(found.methods) == {"spo"}
    assert "own_rules" not in sys.modules
    assert (found.run.config.engine.type, found.run.config.data.verifier) == ("vllm", "own_rules:Verifier")


def test_a_checkpoint_of_other_settings_is_not_taken_for_that_of_the_configuration(folder):
    manifest, config = folder / "method_spo" / "manifest.json", json.loads((folder / "config.json").read_text())
    trained = {"method": config["methods"]["spo"], "preference": config["preference"]}
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"config": trained}))
    assert set(read_finished(folder).methods) == {"spo"}
    configure(folder, lambda tree: tree["methods"]["spo"].update(lambda_sft=99.0))
    with pytest.raises(UserError, match="not finished, method_spo was trained with other settings of method than"):
        read_finished(folder)
