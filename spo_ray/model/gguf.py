"""Import of GGUF files, the format of llama.cpp, as Hugging Face checkpoints in float32."""

import tempfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
)
from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

from spo_ray.errors import UserError
from spo_ray.runtime.artifact import sha256, versions, write_json
from spo_ray.runtime.console import log, warn

ORIGIN = "origin.json"
"""File in the imported folder with name, size, SHA-256 and architecture of the GGUF file, and package versions."""
MAGIC = b"GGUF"
READ = sorted(({*GGUF_SUPPORTED_ARCHITECTURES, *GGUF_CONFIG_ARCHS}) - {"general", "tokenizer", "t5", "umt5"})
"""Architectures of causal language models that transformers reads, in its spelling."""
DIGIT_SPLITS = {"smollm", "starcoder", "refact", "command-r"}
"""Names in ``tokenizer.ggml.pre`` of GPT-2's split of text with every digit apart, which transformers does not know."""
GPT2_SPLITS = {"gpt-2", "phi-2", "mpt", "olmo", "jais"}
"""Names in ``tokenizer.ggml.pre`` of GPT-2's split, which transformers applies to all names that it does not know."""
TEXT = "Ada's 3 pens cost $12.50:\n\n1. naïve - 30% off?\n  2. x = y_1 + 45\n"


def import_gguf(file: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file to a folder, dequantised to float32, as safetensors.

    The folder appears when everything in it is written and checked.

    Args:
        file: the GGUF file.
        folder: a folder that does not exist yet, or an empty one.

    Raises:
        UserError: the file can't be read, its architecture or position scaling is not read by transformers, weights
            are missing or not finite, its tokenizer changes a text, or the folder is not empty.
    """
    header = _Header(file)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} is not an empty folder: give another one, or remove it")
    log("import", f"reading {file}, architecture {header.architecture}")
    try:
        model, tokenizer = _model(header), _tokenizer(header)
    except (ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{file} can't be read by transformers: {error}") from error
    origin = {
        "file": file.name,
        "bytes": file.stat().st_size,
        "sha256": sha256(file),
        "architecture": header.architecture,
        "name": header.get("general.name"),
        "license": header.get("general.license"),
        "parameters": model.num_parameters(),
        "tied_embeddings": model.config.tie_word_embeddings,
        "chat_template": tokenizer.chat_template is not None,
        "versions": versions() | {"gguf": metadata.version("gguf")},
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        made = Path(temporary) / "model"  # not the folder itself, which only its owner may read
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        _check_tokenizer(file, tokenizer, AutoTokenizer.from_pretrained(made))
        write_json(made / ORIGIN, origin)
        made.replace(folder)
    log("import", f"{origin['parameters']:,} parameters in float32 in {folder}")


class _Header:
    """Metadata and tensor names of a GGUF file; refuses what transformers would not read, or would read wrongly."""

    def __init__(self, file: Path) -> None:
        if not file.is_file():
            raise UserError(f"no such file: {file}")
        with file.open("rb") as stream:
            if stream.read(len(MAGIC)) != MAGIC:
                raise UserError(f"{file} is not a GGUF file: it does not start with the letters GGUF")
        if find_spec("gguf") is None:
            raise UserError("reading GGUF files needs the package gguf: pip install 'spo-ray[gguf]'")
        from gguf import GGUFReader

        try:
            self.reader = GGUFReader(file)
        except (ValueError, KeyError, IndexError, OverflowError) as error:
            raise UserError(f"{file} is damaged or not complete: {error}") from error
        self.file = file
        self.architecture = str(self.get("general.architecture"))
        if _plain(self.architecture) not in map(_plain, READ):
            raise UserError(
                f"{file}: the architecture {self.architecture} is not read by transformers "
                f"{metadata.version('transformers')}, which reads {', '.join(READ)}"
            )
        self.place = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}

    def get(self, key: str) -> Any:
        """Return a value of the metadata, or None."""
        field = self.reader.get_field(key)
        return field.contents() if field else None

    @property
    def scales_positions(self) -> bool:
        """True if rotary positions are scaled, by metadata or by a tensor of factors."""
        scaling = self.get(f"{self.architecture}.rope.scaling.type") or "none"
        return scaling != "none" or any(t.name.startswith(("rope_freqs", "rope_factors")) for t in self.reader.tensors)


def _plain(name: str) -> str:
    return name.replace("-", "").replace("_", "")


def _model(header: _Header) -> PreTrainedModel:
    """Load the weights in float32 and move them to a model that transformers does not take for quantised."""
    config = AutoConfig.from_pretrained(**header.place)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{header.file}: {config.model_type} is not a causal language model")
    rope = getattr(config, "rope_parameters", None) or {}
    if header.scales_positions and rope.get("rope_type", "default") == "default":
        raise UserError(
            f"{header.file} scales its rotary positions, which transformers does not read from GGUF files of "
            f"{header.architecture}: use the checkpoint that the file was made from"
        )
    result: Any = AutoModelForCausalLM.from_pretrained(
        **header.place,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
    )
    loaded, info = result
    if info["missing_keys"] or info["mismatched_keys"]:
        names = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise UserError(f"{header.file} lacks weights of a {config.model_type} model: {', '.join(names[:3])}")
    _check_weights(header.file, loaded)
    vars(config).pop("_model_name_or_path", None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()  # assigning weights may have separated input and output embeddings
    model.generation_config = loaded.generation_config
    return model


def _check_weights(file: Path, model: Any) -> None:
    wrong = [name for name, value in model.named_parameters() if not torch.isfinite(value).all()]
    if wrong:
        raise UserError(f"{file} has weights that are not finite numbers: {', '.join(wrong[:3])}")
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    if tied != model.config.tie_word_embeddings:
        raise UserError(f"{file}: embeddings are {'tied' if tied else 'apart'}, but its configuration says otherwise")


def _tokenizer(header: _Header) -> Any:
    tokenizer: Any = AutoTokenizer.from_pretrained(**header.place)
    split = header.get("tokenizer.ggml.pre")
    if header.get("tokenizer.ggml.model") == "gpt2" and split in DIGIT_SPLITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif header.get("tokenizer.ggml.model") == "gpt2" and split not in {*GGUF_PRE_TOKENIZER_SPLITS, *GPT2_SPLITS}:
        warn(
            "import", f"text is split as in GPT-2, since transformers does not know the file's split {split!r}: compare"
        )
    if tokenizer.chat_template is None:
        warn("import", "the file has no chat template: set model.chat_template to train this model")
    return tokenizer


def _check_tokenizer(file: Path, read: Any, saved: Any) -> None:
    """Check that a text survives encoding and decoding, and that the saved tokenizer encodes it like the one read."""
    ids = read(TEXT, add_special_tokens=False)["input_ids"]
    again = read.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if again.strip() != TEXT.strip():
        raise UserError(f"{file}: its tokenizer does not restore a text: {again!r} instead of {TEXT!r}")
    if saved(TEXT, add_special_tokens=False)["input_ids"] != ids or saved.chat_template != read.chat_template:
        raise UserError(f"{file}: the saved tokenizer differs from the file's")
