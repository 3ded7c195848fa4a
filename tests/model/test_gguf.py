"""Import of GGUF files that are written here with the package gguf, against the models and tokenizer they come from."""

import hashlib
import importlib.util
import json

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from spo_ray.errors import UserError
from spo_ray.model.gguf import ORIGIN, import_gguf
from spo_ray.model.load import load_model
from spo_ray.model.tokenizer import ChatTokenizer
from spo_ray.pipeline import cli

gguf = pytest.importorskip("gguf")

LAYERS, HEADS, KV_HEADS, VOCABULARY = 2, 4, 2, 439  # as many tokens as the toy base has
TEXTS = ["3 + 14 = 17\n\n1. So 5 pens", "  It's\n\n20 x 3!\n", "<|user|>How many?<|end|>"]


def make_model(family="llama", tied=True):
    torch.manual_seed(0)
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[family]
    config = config_class(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        rms_norm_eps=1e-3,
    )
    model = model_class(config)
    for parameter in model.parameters():  # norms and biases too
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def interleaved(weight, heads):
    """llama.cpp's order of a head's rows in Llama: the halves that rotate together stand in turns."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_tensors(writer, model, arch, change, quantised):
    names = gguf.get_tensor_name_map({"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}[arch], LAYERS)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        value = tensor.numpy()
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            value = interleaved(value, HEADS if "q_proj" in name else KV_HEADS)
        value = change(name, value)
        if value is None:
            continue
        kind = quantised if value.ndim == 2 else None
        value = gguf.quantize(value, kind) if kind else np.ascontiguousarray(value)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), value, raw_dtype=kind)


def write_tokenizer(writer, folder, template):
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    special = {token["content"]: token["id"] for token in content["added_tokens"]}
    tokens = sorted(vocabulary | special, key=(vocabulary | special).get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]])
    writer.add_eos_token_id(special["<|end|>"])
    writer.add_pad_token_id(special["<|pad|>"])
    if template:
        writer.add_chat_template(AutoTokenizer.from_pretrained(folder).chat_template)


@pytest.fixture
def write(tmp_path, toy_base):
    """A function that writes a GGUF file; ``change`` maps a weight's name and value to what is written, or None."""

    def write(
        model,
        arch="llama",
        *,
        named=None,
        template=True,
        scaling=None,
        quantised=None,
        change=lambda name, value: value,
    ):
        file, config = tmp_path / "tiny.gguf", model.config
        writer = gguf.GGUFWriter(file, named or arch)
        writer.add_name("Tiny")
        writer.add_context_length(config.max_position_embeddings)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
        if scaling:
            writer.add_rope_scaling_type(scaling)
        write_tokenizer(writer, toy_base, template)
        write_tensors(writer, model, arch, change, quantised)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return file

    return write


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_logits_are_those_of_the_model_in_the_file(write, tmp_path, family, tied):
    model = make_model(family, tied)
    import_gguf(write(model, family), tmp_path / "imported")
    read = load_model(tmp_path / "imported").eval()
    assert read.config.tie_word_embeddings is tied
    assert (read.lm_head.weight is read.model.embed_tokens.weight) is tied
    assert {p.dtype for p in read.parameters()} == {torch.float32}
    ids = torch.randint(0, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(read(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_quantised_weights_are_what_gguf_makes_of_them(write, tmp_path):
    model, kind = make_model(), gguf.GGMLQuantizationType.Q8_0
    import_gguf(write(model, quantised=kind), tmp_path / "imported")
    found = load_model(tmp_path / "imported").state_dict()
    for name, weight in model.state_dict().items():
        if weight.ndim == 2:
            wanted = torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind))
            torch.testing.assert_close(found[name], wanted, rtol=0, atol=0)
            assert not torch.equal(wanted, weight)


def test_the_tokenizer_is_the_one_in_the_file(write, tmp_path, toy_base, chat):
    import_gguf(write(make_model()), tmp_path / "imported")
    read = ChatTokenizer.load(tmp_path / "imported")
    assert read.end_id == chat.end_id
    assert read.pad_id == chat.pad_id
    for text in TEXTS:
        assert read.prompt_ids(text) == chat.prompt_ids(text)
        assert read.completion_ids(text) == chat.completion_ids(text)
    assert read.tokenizer.chat_template == chat.tokenizer.chat_template


def test_digits_are_split_before_spaces_as_in_llama_cpp(write, tmp_path):
    """By its regular expressions for smollm: a digit alone, then GPT-2's; GPT-2's alone would part the line breaks."""
    import_gguf(write(make_model()), tmp_path / "imported")
    split = AutoTokenizer.from_pretrained(tmp_path / "imported").backend_tokenizer.pre_tokenizer.pre_tokenize_str
    assert [piece for piece, _ in split("It's 17\n\n1. So")] == ["It", "'s", "Ġ", "1", "7", "ĊĊ", "1", ".", "ĠSo"]


def test_the_origin_is_noted(write, tmp_path):
    file = write(make_model())
    assert cli.app(["import-gguf", str(file), str(tmp_path / "new" / "imported")], result_action="return_value") == 0
    origin = json.loads((tmp_path / "new" / "imported" / ORIGIN).read_text())
    assert origin["file"] == "tiny.gguf"
    assert origin["bytes"] == file.stat().st_size
    assert origin["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (origin["architecture"], origin["name"]) == ("llama", "Tiny")
    assert origin["parameters"] == make_model().num_parameters()
    assert {"gguf", "transformers", "spo_ray"} <= origin["versions"].keys()


def refused(file, folder, message):
    with pytest.raises(UserError, match=message):
        import_gguf(file, folder)


def test_files_that_are_no_gguf_files_are_refused(write, tmp_path):
    refused(tmp_path / "absent.gguf", tmp_path / "imported", "no such file: .*absent")
    (tmp_path / "other.gguf").write_bytes(b"PK\x03\x04" * 9)
    refused(tmp_path / "other.gguf", tmp_path / "imported", "not a GGUF file")
    whole = write(make_model()).read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "cut.gguf", tmp_path / "imported", "damaged or not complete")


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    assert cli.app(["import-gguf", str(tmp_path / "a.gguf"), str(tmp_path / "b")], result_action="return_value") == 2
    assert "error: no such file" in capsys.readouterr().err


def test_an_architecture_that_is_not_read_is_named(write, tmp_path):
    refused(write(make_model(), named="rwkv6"), tmp_path / "imported", r"rwkv6 is not read .* gemma2, .*llama, .*qwen2")


def test_a_folder_with_files_is_left_alone(write, tmp_path):
    file, folder = write(make_model()), tmp_path / "imported"
    folder.mkdir()
    import_gguf(file, folder)  # into an empty folder
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    refused(file, folder, "imported is not an empty folder")
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_the_missing_package_is_named(write, tmp_path, monkeypatch):
    file, find = write(make_model()), importlib.util.find_spec
    monkeypatch.setattr("spo_ray.model.gguf.find_spec", lambda name: None if name == "gguf" else find(name))
    refused(file, tmp_path / "imported", r"pip install 'spo-ray\[gguf\]'")


def test_scaled_positions_are_refused(write, tmp_path):
    refused(
        write(make_model(), scaling=gguf.RopeScalingType.YARN), tmp_path / "imported", "scales its rotary positions"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, value: value * np.float32("nan") if "1.mlp.up" in name else value, "not finite.*1.mlp.up"),
        (lambda name, value: None if "1.mlp.up" in name else value, "lacks weights.*1.mlp.up"),
    ],
    ids=["nan", "missing"],
)
def test_weights_are_checked(write, tmp_path, change, message):
    refused(write(make_model(), change=change), tmp_path / "imported", message)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_a_missing_chat_template_is_told(write, tmp_path, caplog):
    import_gguf(write(make_model(), template=False), tmp_path / "imported")
    assert "set model.chat_template" in caplog.text
    with pytest.raises(UserError, match="no chat template"):
        ChatTokenizer.load(tmp_path / "imported")
