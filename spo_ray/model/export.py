"""Exports that other programs load: merged Hugging Face checkpoints with a probe of their own log-probabilities."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from torch import nn
from transformers import AutoTokenizer

from spo_ray.core.lm_head import base_of
from spo_ray.errors import UserError
from spo_ray.model.load import PHI, THETA, load_model
from spo_ray.model.tokenizer import ChatTokenizer

PROBE = "spo_probe.json"
BACKBONE, ADAPTER = "backbone", "adapter"
ADAPTER_CONFIG = "adapter_config.json"
_CARD = "README.md"


@dataclass(frozen=True)
class Probe:
    """A text and the trainer's log-probability of it, for comparison with whatever loads the weights."""

    prompt_ids: list[int]
    completion_ids: list[int]
    logp: float
    """Sum over the completion's tokens, nats."""


def export(
    model: nn.Module,
    chat: ChatTokenizer,
    path: Path,
    probe: Probe,
    *,
    method: str = "sft",
    backbone_and_adapter: bool = False,
) -> None:
    """Save model, tokenizer, probe and a model card, in float32; the model can't be trained further afterwards.

    Adapters are merged into the weights. With ``backbone_and_adapter`` there are also ``backbone/``, a checkpoint of
    its own with what is theta's merged, and ``adapter/``, phi as a PEFT adapter for it.

    Args:
        model: as :func:`spo_ray.model.load.build_policy` makes it, with all its weights in this process. It may have
            been built on the meta device and filled by ``load_state_dict(..., assign=True)``.
        chat: the tokenizer.
        path: folder, made if need be.
        probe: of the model as it stands.
        method: what it was trained by, for the card.
        backbone_and_adapter: only for models with phi.

    Raises:
        ValueError: there is no phi to save apart.
    """
    whole: Any = model
    base = base_of(whole)
    adapters = list(getattr(whole, "peft_config", {}))
    if backbone_and_adapter and PHI not in adapters:
        raise ValueError("the model has no adapter phi to save apart from its backbone")
    _stop_at(base.generation_config, chat.stop_ids)
    base.tie_weights()  # where weights were assigned, input and output embeddings may have become two
    whole.float()
    origin = _origin(base.name_or_path)
    if adapters:
        layers = _adapter_layers(whole)
        _merge(layers, THETA)
        if backbone_and_adapter:
            _save_adapter(whole, path / ADAPTER, origin, method)
        base = whole.unload()
        if backbone_and_adapter:
            _save_model(base, chat, path / BACKBONE, _card(origin, method, f"Without the adapter in `../{ADAPTER}`."))
        _merge(layers, PHI)
    text = f"`{PROBE}` has a text with the log-probability that training ended with, to compare other programs with."
    _save_model(base, chat, path, _card(origin, method, text))
    (path / PROBE).write_text(json.dumps(asdict(probe)))


def read_probe(path: str | Path) -> dict[str, Any] | None:
    """The probe of a checkpoint exported here; None for any other model."""
    file = Path(path) / PROBE
    return json.loads(file.read_text()) if file.is_file() else None


def is_adapter(path: str | Path) -> bool:
    """Whether a folder holds a PEFT adapter without its model."""
    return (Path(path) / ADAPTER_CONFIG).is_file()


def adapted(path: Path) -> Path | str:
    """The model that an adapter is for: a folder beside it, or what its configuration names.

    Raises:
        UserError: it names none.
    """
    name = json.loads((path / ADAPTER_CONFIG).read_text()).get("base_model_name_or_path")
    if not name:
        raise UserError(f"{path / ADAPTER_CONFIG} names no base_model_name_or_path: add it")
    beside = (path / name).resolve()
    return beside if beside.is_dir() else name


def merge_adapter(path: Path, into: Path) -> None:
    """Save an adapter's model with the adapter merged, in float32, with the tokenizer."""
    from peft import PeftModel

    source = adapted(path)
    model: Any = PeftModel.from_pretrained(load_model(source), path)
    model.merge_and_unload().save_pretrained(into)
    tokenizer: Any = AutoTokenizer.from_pretrained(path if (path / "tokenizer_config.json").is_file() else source)
    tokenizer.save_pretrained(into)


def _stop_at(settings: Any, stop_ids: Sequence[int]) -> None:
    """Generation ends where training's answers did: a base model's settings may know no end of turn."""
    known = settings.eos_token_id
    known = [known] if isinstance(known, int) else known or []
    settings.eos_token_id = [*known, *(token for token in stop_ids if token not in known)]


def _adapter_layers(model: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _merge(layers: Sequence[Any], adapter: str) -> None:
    """Add an adapter to the weights below it; nothing where a layer has none of that name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of theta and phi being merged one after the other
        for layer in layers:
            layer.merge(adapter_names=[adapter])


def _save_model(base: Any, chat: ChatTokenizer, path: Path, card: ModelCard) -> None:
    base.save_pretrained(path)
    chat.tokenizer.save_pretrained(path)
    card.save(path / _CARD)


def _save_adapter(model: Any, path: Path, origin: str, method: str) -> None:
    # relative, for the two folders belong together wherever they go: an absolute path would be wrong after a move
    model.peft_config[PHI].base_model_name_or_path = f"../{BACKBONE}"
    # whether embeddings were resized is not for PEFT to find out on the hub
    model.save_pretrained(path, selected_adapters=[PHI], save_embedding_layers=False)
    text = f"A PEFT adapter for the model in `../{BACKBONE}`, and for no other: that is {origin} no more."
    _card(origin, method, text, library="peft").save(path / _CARD)


def _card(origin: str, method: str, text: str, library: str = "transformers") -> ModelCard:
    data = ModelCardData(
        base_model=origin, library_name=library, pipeline_tag="text-generation", tags=["spo_ray", method]
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {origin}, {method}\n\nTrained with spo_ray. {text}\n")


def _origin(name: str) -> str:
    """The base model's hub id, or its folder's name; for a checkpoint exported here, what its own card says."""
    folder = Path(name)
    if not folder.is_dir():
        return name
    card = folder / _CARD
    if (folder / PROBE).is_file() and card.is_file():
        return str(ModelCard.load(card).data.base_model)
    return folder.resolve().name
