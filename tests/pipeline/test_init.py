"""spo-ray init: the file it writes, its learning rates, and what it refuses."""

import json
import os
import struct
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from spo_ray.config.load import load
from spo_ray.pipeline import cli
from spo_ray.pipeline.init import parameters, text_for


def call(*arguments):
    return int(cli.app(["init", *arguments], exit_on_error=False, result_action="return_value") or 0)


def test_the_shipped_file_is_what_it_writes_for_the_toy_model(in_root, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    file = Path("configs/preferences.yaml")
    assert file.read_text() == text_for(file, "data/preferences.jsonl", "assets/toy_base", "cpu")


@pytest.mark.parametrize(
    ("model", "millions", "rates"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 135, [5e-5, 5e-6, 5e-5]),
        ("Qwen/Qwen2.5-0.5B-Instruct", 500, [2e-5, 1e-6, 1e-5]),
        ("Qwen/Qwen2.5-7B-Instruct", 7000, [1e-5, 5e-7, 5e-6]),
        ("someone/model", None, [2e-5, 1e-6, 1e-5]),
        ("mine", 70, [5e-5, 5e-6, 5e-5]),
    ],
)
def test_rates_follow_the_models_size_and_the_machine_sets_the_type(tmp_path, monkeypatch, model, millions, rates):
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    header = json.dumps({"w": {"dtype": "BF16", "shape": [7000, 10000]}, "__metadata__": {"format": "pt"}}).encode()
    Path("mine/model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert parameters(model) == (millions and millions * 10**6)
    Path("pairs.jsonl").write_text("{}")
    assert call("out.yaml", "--data", "pairs.jsonl", "--model", model, "--machine", "gpu") == 0
    config = load("out.yaml")
    assert [config.sft.lr, config.preference.theta.lr, config.preference.phi.lr] == rates
    assert (config.name, config.train.precision, config.engine.dtype) == ("out", "bfloat16", "bfloat16")
    assert (config.train.gradient_checkpointing, config.methods["spo"].base.beta) == (True, 0.1)
    simpler, spo = config.methods["dpo_nll"], config.methods["spo"]
    assert (simpler.beta, simpler.mu, simpler.sft_reduction) == (spo.base.beta, spo.lambda_sft, spo.sft_reduction)


def test_parameters_are_those_of_the_model(toy_base):
    assert parameters(str(toy_base)) == sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(toy_base).parameters()
    )


def test_what_it_refuses_and_what_it_asks(tmp_path, monkeypatch, capsys):
    """The answers are given by a function in the place of ``input``: there is no terminal here."""
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text("{}")
    assert call("--data", "pairs.jsonl") == 2
    assert "nothing can be asked: set --model (" in capsys.readouterr().err
    assert call("--data", "pair.jsonl", "--model", "org/model") == 2
    assert "--data: there is no file or folder pair.jsonl; did you mean pairs.jsonl?" in capsys.readouterr().err
    Path("broken").mkdir()
    for content in (b"", b"\xff" * 8 + b"{", struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 9) + b'{"a": {}}'):
        Path("broken/model.safetensors").write_bytes(content)
        assert call("--data", "pairs.jsonl", "--model", "broken", "--machine", "cpu") == 2
        assert "the weights of broken can't be read: " in capsys.readouterr().err
    answers = iter(["pairs.jsonl", "org/model-1b", "tpu", ""])
    monkeypatch.setattr("builtins.input", lambda question: next(answers))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert call() == 0
    assert load("run.yaml").train.precision == "float32"
    assert call("--data", "pairs.jsonl", "--model", "org/model-1b", "--machine", "gpu") == 2
    assert "run.yaml is there already" in capsys.readouterr().err
    assert call("--data", "pairs.jsonl", "--model", "org/model-1b", "--machine", "gpu", "--force") == 0
    assert load("run.yaml").train.precision == "bfloat16"
    Path("folder").mkdir()
    Path("folder/pairs: {#1}.jsonl").write_text("{}")
    settings = ("--data", "folder/pairs: {#1}.jsonl", "--model", "org/model-1b", "--machine", "gpu", "--force")
    assert call("folder", *settings) == 2
    assert "folder is no file: name another one" in capsys.readouterr().err
    assert call("x" * 300, *settings) == 1
    error = capsys.readouterr().err
    assert f"File name too long: '{'x' * 300}'" in error
    assert "Traceback" not in error
    assert call("new/folder/run.yaml", *settings) == 0
    assert load("new/folder/run.yaml").data.path == Path("folder/pairs: {#1}.jsonl")
