"""PEFT adapters as base models: merged at the start, or refused with a reason."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from spo_ray.config.model import ModelConfig
from spo_ray.errors import UserError
from spo_ray.model.adapter import ModelSource
from spo_ray.model.load import load_model
from spo_ray.pipeline.job import base_model, plan_job
from spo_ray.runtime.run import Run

from ..helpers import small_config

IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture
def adapter(toy_base, tmp_path):
    """A LoRA adapter of the toy model, away from its start."""
    model = get_peft_model(load_model(toy_base), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    return tmp_path / "adapter"


@pytest.mark.parametrize("named", ["as path", "beside path", "in one folder"])
def test_an_adapter_is_merged_before_the_job(in_root, toy_base, adapter, tmp_path, named):
    expected = PeftModel.from_pretrained(load_model(toy_base), adapter)(IDS).logits
    path = {"as path": adapter, "beside path": toy_base, "in one folder": tmp_path / "both"}[named]
    overrides = [f"model.path={path}"]
    if named == "in one folder":
        shutil.copytree(toy_base, path)
        shutil.copytree(adapter, path, dirs_exist_ok=True)
    if named != "as path":
        overrides.append(f"model.adapter={path if named == 'in one folder' else adapter}")
    config = small_config(tmp_path / "runs", *overrides)
    plan = plan_job(config)
    assert plan.problem is None
    assert [(stage.name, stage.state) for stage in plan.planned if stage.name == "base_model"] == [
        ("base_model", "build")
    ]
    base = base_model(Run(config))
    assert torch.allclose(load_model(base.path)(IDS).logits, expected, atol=1e-5)
    assert not torch.allclose(load_model(toy_base)(IDS).logits, expected, atol=1e-2)
    assert base_model(Run(config)).digest == base.digest


def test_no_adapter_where_one_is_named(toy_base):
    with pytest.raises(UserError, match=r"no adapter in model\.adapter=.* \(no adapter_config\.json there\)"):
        ModelSource.of(ModelConfig(path=str(toy_base), adapter=toy_base))


def test_an_adapter_that_names_no_model(adapter):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(UserError, match=r"names no base_model_name_or_path: add it, or set model\.path to its model"):
        ModelSource.of(ModelConfig(path=str(adapter)))


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        (
            "model.embed_tokens.weight",
            (450, 96),
            r"embed_tokens\.weight has the shape \[450, 96\], the model's weight \[439",
        ),
        ("model.layers.0.mlp.up_proj.lora_A.weight", (8, 64), r"lora_A\.weight has the shape \[8, 64\]"),
        ("model.embed_tokens.lora_embedding_A", (8, 450), r"lora_embedding_A has the shape \[8, 450\]"),
    ],
)
def test_an_adapter_of_another_size_is_refused_before_the_job(toy_base, adapter, key, shape, message):
    file = adapter / "adapter_model.safetensors"
    save_file(load_file(file) | {f"base_model.model.{key}": torch.zeros(shape)}, file, {"format": "pt"})
    with pytest.raises(UserError, match=message):
        ModelSource.of(ModelConfig(path=str(adapter))).check()
