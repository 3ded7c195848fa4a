"""Configurations and generation settings that transformers refuses, now or only when it saves them."""

import json
import shutil

import pytest
import torch
from transformers import GenerationConfig

from spo_ray.errors import UserError
from spo_ray.model.checkpoint_config import generation_settings, model_config
from spo_ray.model.checkpoint_files import check_checkpoint
from spo_ray.model.export import Probe, export
from spo_ray.model.load import load_model


@pytest.fixture
def model(toy_base, tmp_path):
    return shutil.copytree(toy_base, tmp_path / "model")


def changed(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ({"pad_token_id": -1}, {"pad_token_id": None, "do_sample": None}),
        ({"max_new_tokens": 0}, {"max_new_tokens": None, "do_sample": None}),
        ({"num_return_sequences": 4}, {"num_return_sequences": 4, "do_sample": True}),
        ({"temperature": 0.6, "early_stopping": "x"}, {"temperature": 0.6, "early_stopping": None, "do_sample": True}),
        ({"num_beams": 2, "num_beam_groups": 2}, {"num_beams": 2}),
    ],
)
def test_generation_settings_load_and_are_exported(model, chat, tmp_path, values, kept):
    """transformers refuses these at load, or only when it saves them."""
    changed(model / "generation_config.json", **values)
    check_checkpoint(model, trained=True)
    export(load_model(model), chat, tmp_path / "out", Probe([1], [1], 0.0))
    found = GenerationConfig.from_pretrained(tmp_path / "out")
    assert {name: getattr(found, name) for name in kept} == kept
    assert 1 in found.eos_token_id


def test_generation_settings_that_are_no_object(model):
    (model / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"generation_config\.json can't be read \(.*\): correct it, or remove it"):
        generation_settings(model)


@pytest.mark.parametrize("pad", [439, -1])
def test_a_padding_token_that_is_not_in_the_embedding(model, toy_base, pad):
    changed(model / "config.json", pad_token_id=pad)
    assert model_config(model).pad_token_id is None
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(load_model(model)(ids).logits, load_model(toy_base)(ids).logits)


def test_what_the_export_would_refuse_is_refused_before(model, monkeypatch):
    """No configuration is known that loads and can't be saved, so saving fails here by itself."""

    def refuse(self, *_, **__):
        raise ValueError("a value\nis refused")

    monkeypatch.setattr("transformers.PretrainedConfig.save_pretrained", refuse)
    check_checkpoint(model)
    with pytest.raises(UserError, match="could not be saved after training: a value is refused"):
        check_checkpoint(model, trained=True)
