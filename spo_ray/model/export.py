"""Export of trained models as Hugging Face checkpoints, with a text and its log-probability to check them by."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from torch import nn

from spo_ray.core.lm_head import base_of
from spo_ray.model.load import PHI, THETA
from spo_ray.model.tokenizer import ChatTokenizer

PROBE = "spo_probe.json"
BACKBONE, ADAPTER = "backbone", "adapter"
_CARD = "README.md"


@dataclass(frozen=True)
class Probe:
    """A text and the trainer's log-probability of it, for comparison with programs that load the weights."""

    prompt_ids: list[int]
    completion_ids: list[int]
    logp: float
    """Log-probability of the completion, nats, summed over its tokens."""


def export(
    model: nn.Module,
    chat: ChatTokenizer,
    path: Path,
    probe: Probe,
    *,
    method: str = "sft",
    backbone_and_adapter: bool = False,
    about: str = "",
) -> None:
    """Save model, tokenizer, probe and a model card, in float32; the model can't be trained further afterwards.

    Adapters are merged into the weights. ``backbone_and_adapter`` also saves ``backbone/``, a checkpoint with theta
    merged, and ``adapter/``, phi as a PEFT adapter for it.

    Args:
        model: a model of :func:`spo_ray.model.load.build_policy` with all its weights in this process. It may have
            been built on the meta device and filled by ``load_state_dict(..., assign=True)``.
        chat: the tokenizer.
        path: folder, created if it is missing.
        probe: text and log-probability under the model.
        method: the training method, for the card.
        backbone_and_adapter: also save the two parts; only for models with phi.
        about: sections of the card in Markdown: data, settings, results.

    Raises:
        ValueError: ``backbone_and_adapter`` for a model without phi.
    """
    whole: Any = model
    base = base_of(whole)
    adapters = list(getattr(whole, "peft_config", {}))
    if backbone_and_adapter and PHI not in adapters:
        raise ValueError("the model has no adapter phi to save apart from its backbone")
    _stop_at(base.generation_config, chat.stop_ids)
    base.tie_weights()  # assigning weights may have separated input and output embeddings
    whole.float()
    origin = _origin(base.name_or_path)
    card = partial(_card, origin, method, about, _license(base.name_or_path))
    if adapters:
        layers = _adapter_layers(whole)
        _merge(layers, THETA)
        if backbone_and_adapter:
            text = f"A PEFT adapter for the model in `../{BACKBONE}`, and for no other: that is {origin} no more."
            _save_adapter(whole, path / ADAPTER, card(text, library="peft"))
        base = whole.unload()
        if backbone_and_adapter:
            _save_model(base, chat, path / BACKBONE, card(f"Without the adapter in `../{ADAPTER}`."))
        _merge(layers, PHI)
    text = f"`{PROBE}` has a text with the log-probability that training ended with, to compare other programs with."
    _save_model(base, chat, path, card(text))
    (path / PROBE).write_text(json.dumps(asdict(probe)))


def read_probe(path: str | Path) -> dict[str, Any] | None:
    """Return the probe of a checkpoint that spo_ray exported, or None for any other model."""
    file = Path(path) / PROBE
    return json.loads(file.read_text()) if file.is_file() else None


def _stop_at(settings: Any, stop_ids: Sequence[int]) -> None:
    """Add the end-of-turn token to the tokens that end a generation; base models often lack it."""
    known = settings.eos_token_id
    known = [known] if isinstance(known, int) else known or []
    settings.eos_token_id = [*known, *(token for token in stop_ids if token not in known)]


def _adapter_layers(model: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _merge(layers: Sequence[Any], adapter: str) -> None:
    """Merge an adapter into the weights; layers without an adapter of that name are not changed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that a second adapter is merged after the first
        for layer in layers:
            layer.merge(adapter_names=[adapter])


def _save_model(base: Any, chat: ChatTokenizer, path: Path, card: ModelCard) -> None:
    base.save_pretrained(path)
    chat.tokenizer.save_pretrained(path)
    card.save(path / _CARD)


def _save_adapter(model: Any, path: Path, card: ModelCard) -> None:
    # relative, because an absolute path would be wrong after the folders are moved together
    model.peft_config[PHI].base_model_name_or_path = f"../{BACKBONE}"
    # save_embedding_layers=False: PEFT would ask the hub if embeddings were resized
    model.save_pretrained(path, selected_adapters=[PHI], save_embedding_layers=False)
    card.save(path / _CARD)


def _card(
    origin: str, method: str, about: str, license: str | None, text: str, library: str = "transformers"
) -> ModelCard:
    tags, task = ["spo_ray", method], "text-generation"
    data = ModelCardData(base_model=origin, license=license, library_name=library, pipeline_tag=task, tags=tags)
    terms = f"`{license}`, the licence of {origin}" if license else f"That of {origin}, which its card names"
    parts = [f"# {origin}, {method}", f"Trained with spo_ray. {text}", about, f"## Licence\n\n{terms}."]
    return ModelCard("\n\n".join([f"---\n{data.to_yaml()}\n---", *filter(None, parts)]) + "\n")


def _license(name: str) -> str | None:
    """Return the licence that the card in a model's folder names; None if there is none."""
    card = Path(name) / _CARD
    try:
        found = ModelCard.load(card).data.license if card.is_file() else None
    except Exception:  # YAML's errors, and those of the hub's checks: a card is written without it
        return None
    return found if isinstance(found, str) else None


def _origin(name: str) -> str:
    """Return the base model's hub id or folder name; of a checkpoint that spo_ray exported, the name in its card."""
    folder = Path(name)
    if not folder.is_dir():
        return name
    card = folder / _CARD
    if (folder / PROBE).is_file() and card.is_file():
        return str(ModelCard.load(card).data.base_model)
    return folder.resolve().name
