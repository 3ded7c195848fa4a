"""PEFT adapters as checkpoints: which model they belong to, do they fit it, and merging."""

import json
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoTokenizer

from spo_ray.config.model import ModelConfig
from spo_ray.errors import UserError
from spo_ray.model.checkpoint_files import ADAPTER_CONFIG, check_checkpoint, stored_tensors
from spo_ray.model.load import load_model

_PREFIX = "base_model.model."
_SHARED = {"A.weight": [(1, 1)], "B.weight": [(0, 0)], "embedding_A": [(1, 0)], "embedding_B": [(0, 1)]}
"""Dimensions of LoRA's matrices that are those of the weight below, as (of the matrix, of the weight)."""


class ModelSource(NamedTuple):
    """Where the base model of a job comes from."""

    model: Path | str
    """Folder or hub id of a model."""
    adapter: Path | None
    """Folder of the adapter that is merged into it; None: none."""

    @classmethod
    def of(cls, config: ModelConfig) -> "ModelSource":
        """Return the source that a configuration names; its ``path`` may be an adapter's folder."""
        if config.adapter is not None:
            if not (config.adapter / ADAPTER_CONFIG).is_file():
                raise UserError(f"no adapter in model.adapter={config.adapter} (no {ADAPTER_CONFIG} there)")
            return cls(config.path, config.adapter)
        return cls(adapted(Path(config.path)), Path(config.path)) if is_adapter(config.path) else cls(config.path, None)

    @property
    def tokenizer(self) -> Path | str:
        """Folder or hub id with the tokenizer: the adapter's, if it has its own."""
        own = self.adapter is not None and (self.adapter / "tokenizer_config.json").is_file()
        return self.adapter if self.adapter is not None and own else self.model

    def check(self) -> None:
        """Check the files of the model and of the adapter, that both fit, and that the model can be exported.

        Raises:
            UserError: they can't be used.
        """
        if self.adapter is None:
            check_checkpoint(self.model, trained=True)
            return
        with _without_adapter(self.model) as model:
            check_checkpoint(model, trained=True)
            _check_shapes(stored_tensors(model), self.adapter, self.model)

    def merge(self, into: Path) -> None:
        """Merge the adapter into the model and save the result in float32, with the tokenizer."""
        from peft import PeftModel

        if self.adapter is None:
            raise ValueError("there is no adapter to merge")
        with _without_adapter(self.model) as folder:
            base = load_model(folder)
            _check_shapes(stored_tensors(folder), self.adapter, self.model)
        base.name_or_path = base.config.name_or_path = str(self.model)
        model: Any = PeftModel.from_pretrained(base, self.adapter)
        model.merge_and_unload().save_pretrained(into)
        tokenizer: Any = AutoTokenizer.from_pretrained(self.tokenizer)
        tokenizer.save_pretrained(into)


def is_adapter(path: str | Path) -> bool:
    """Return True if a folder holds a PEFT adapter without its model."""
    folder = Path(path)
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def adapted(path: Path) -> Path | str:
    """Return the base model of an adapter: a folder relative to it, or the name in its configuration.

    Raises:
        UserError: the configuration names none.
    """
    name = json.loads((path / ADAPTER_CONFIG).read_text()).get("base_model_name_or_path")
    if not name:
        raise UserError(
            f"{path / ADAPTER_CONFIG} names no base_model_name_or_path: add it, or set model.path to its model and "
            f"model.adapter={path}"
        )
    beside = (path / name).resolve()
    return beside if beside.is_dir() else name


def _check_shapes(model: dict[str, Any], adapter: Path, name: Path | str) -> None:
    """Compare an adapter's tensors with the stored tensors of its model: whole weights, and LoRA's outer sizes."""
    for key, one in sorted(stored_tensors(adapter).items()):
        module, is_lora, kind = key.removeprefix(_PREFIX).rpartition(".lora_")
        below = model.get(f"{module}.weight" if is_lora else kind)
        if below is None or len(below.shape) != len(one.shape):
            continue
        pairs = _SHARED.get(kind, []) if is_lora else enumerate(range(len(one.shape)))
        if any(one.shape[i] != below.shape[j] for i, j in pairs):
            raise UserError(
                f"the adapter in {adapter} does not fit {name}: {key} has the shape {[*one.shape]}, the model's weight "
                f"{[*below.shape]}; if the adapter has more tokens, resize the model's embedding, and set model.path "
                f"to the result and model.adapter={adapter}"
            )


@contextmanager
def _without_adapter(path: Path | str) -> Generator[Path | str]:
    """Give a model's folder without the adapter that may be in it, which transformers would load."""
    if not (Path(path) / ADAPTER_CONFIG).is_file():
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        for file in Path(path).absolute().iterdir():
            if not file.name.startswith("adapter_"):
                (Path(folder) / file.name).symlink_to(file)
        yield Path(folder)
