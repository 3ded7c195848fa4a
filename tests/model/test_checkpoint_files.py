"""Checkpoints that are incomplete, damaged or not what their configuration says."""

import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from spo_ray.errors import UserError
from spo_ray.model.checkpoint_files import check_checkpoint, stored_tensors
from spo_ray.model.load import load_model

ONE, OTHER = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"


def rewritten(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def renamed(folder, change):
    file = folder / "model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})


def cut(folder):
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(100_000)


def absurd(folder):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")


def overlapping(folder):
    header = {name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for name in "ab"}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))


def sharded(folder, index):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)


SHARDS = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
DAMAGES = {
    "missing": (lambda f: rewritten(f, lambda t: t.pop(ONE)), rf"the weights in .* lack {ONE}, which its config\.json"),
    "wrapped": (
        lambda f: renamed(f, lambda name: f"_orig_mod.{name}"),
        r"lack .* and 36 more, which its config\.json asks for: they have '_orig_mod\.' in their names, such as _",
    ),
    "wrapped within": (
        lambda f: renamed(f, lambda name: name.replace("q_proj.", "q_proj.base_layer.")),
        r"they have 'base_layer' in their names, such as model\.layers\.0\.self_attn\.q_proj\.base_layer\.bias; save",
    ),
    "another family": (
        lambda f: renamed(f, lambda name: name.replace("layers", "h")),
        r"lack model\.layers\.0\..* and 33 more, .* and have model\.h\.0\..* and 33 more instead: config\.json is",
    ),
    "more": (
        lambda f: rewritten(f, lambda t: t.update({"v_head.weight": torch.ones(2)})),
        r"have v_head\.weight, which its config\.json has no place for: correct it, or remove these weights",
    ),
    "adapter": (
        lambda f: (f / "adapter_config.json").write_text("{}"),
        r"holds a model and an adapter \(adapter_config\.json\): set model\.adapter=.* to merge it at the start",
    ),
    "shape": (
        lambda f: rewritten(f, lambda t: t.update({OTHER: torch.ones(3)})),
        rf"model\.safetensors: {OTHER} has the shape \[3\], by config\.json it has \[96\]",
    ),
    "type": (
        lambda f: rewritten(f, lambda t: t.update({OTHER: torch.ones(64, dtype=torch.int8)})),
        rf"model\.safetensors: {OTHER} has the type I8, and only F64, F32, F16, BF16 can be trained",
    ),
    "cut": (cut, r"model\.safetensors can't be read as safetensors \(.*\): copy or download it again"),
    "absurd": (absurd, r"model\.safetensors can't be read as safetensors"),
    "overlapping": (overlapping, r"model\.safetensors can't be read as safetensors"),
    "absent": (lambda f: (f / "model.safetensors").unlink(), "no weights in .*: only safetensors are loaded"),
    "shard": (lambda f: sharded(f, json.dumps(SHARDS)), r"lacks model-00002-of-00002\.safetensors, which model\."),
    "nan": (
        lambda f: (f / "config.json").write_text('{"model_type": "qwen2", "rope_parameters": {"rope_theta": NaN}}'),
        r"^config\.json of .*model: rope_theta=nan is not finite: correct it$",
    ),
    "link": (
        lambda f: (f / "merges.txt").symlink_to(f / "gone"),
        r"model: merges\.txt leads to no file: copy the checkpoint again, or remove the link$",
    ),
    "layers": (
        lambda f: (f / "config.json").write_text('{"model_type": "qwen2", "num_hidden_layers": 1000000000000}'),
        r"^config\.json of .*model: num_hidden_layers=1000000000000 is above 10000: correct it$",
    ),
    "index": (lambda f: sharded(f, "[" * 100_000), r"model\.safetensors\.index\.json can't be read: RecursionError"),
}


@pytest.fixture
def model(toy_base, tmp_path):
    return shutil.copytree(toy_base, tmp_path / "model")


@pytest.mark.parametrize("damage", DAMAGES)
def test_weights_that_are_not_what_they_seem_are_refused_before_a_run_and_while_loading(model, damage):
    change, message = DAMAGES[damage]
    change(model)
    for use in (check_checkpoint, load_model):
        with pytest.raises(UserError, match=message):
            use(model)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_while_loading(model, value):
    rewritten(model, lambda tensors: tensors[ONE].view(-1)[-1].fill_(value))
    check_checkpoint(model)
    with pytest.raises(UserError, match=rf"model\.safetensors: {ONE} has values that are NaN or infinite"):
        load_model(model)


def test_the_headers_of_a_sharded_checkpoint(model):
    before = stored_tensors(model)
    assert {one.dtype for one in before.values()} == {"BF16"}
    load_model(model).save_pretrained(model, max_shard_size="200KB")
    (model / "model.safetensors").unlink()
    after = stored_tensors(model)
    assert len({one.file for one in after.values()}) > 1
    assert {name: one.shape for name, one in after.items()} == {name: one.shape for name, one in before.items()}
    check_checkpoint(model)
