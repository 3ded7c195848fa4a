"""Checks of a checkpoint's weights: files, headers, names, shapes, types and values, before a run and while loading."""

import json
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from spo_ray.errors import UserError
from spo_ray.model.checkpoint_config import generation_settings, model_config, rehearse_export

WHOLE, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types of weights in a safetensors header; others are quantised weights, or buffers."""
LISTED = 3
"""Number of names that an error lists."""


class Stored(NamedTuple):
    """A tensor as a header describes it."""

    file: Path
    dtype: str
    """Type as safetensors calls it, such as ``BF16``."""
    shape: tuple[int, ...]


def check_checkpoint(path: str | Path, *, trained: bool = False) -> None:
    """Compare the weights of a checkpoint or of a PEFT adapter with its configuration; their values are not read.

    A hub id is checked if it is in the cache. With ``trained`` the export after training is rehearsed too.

    Raises:
        UserError: a file is missing, cut off or too large, names, shapes or types are not those of the model, or it
            could not be exported.
    """
    stored = stored_tensors(path)
    if not stored or next(iter(stored.values())).file.name == ADAPTER:
        return
    try:
        model = load_weights(path, device_map={"": "meta"})
    except UserError:
        raise
    except Exception as error:  # a configuration that transformers refuses: the causes have no common class
        raise UserError(f"the model in {path} can't be loaded: {_first_line(error)}") from error
    if trained:
        rehearse_export(model, path)


def load_weights(path: str | Path, **options: Any) -> PreTrainedModel:
    """Load a causal language model with all its weights from safetensors.

    ``options`` are those of transformers' ``from_pretrained``.

    Raises:
        UserError: a file can't be read, or weights are missing or have another shape; transformers would train them
            from random numbers. Also if there are others than the model has, or an adapter beside it.
    """
    stored = stored_tensors(path)
    if (Path(path) / "config.json").is_file() and (Path(path) / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"{path} holds a model and an adapter ({ADAPTER_CONFIG}): set model.adapter={path} to merge it at the "
            "start, or move it to another folder"
        )
    options = {"config": model_config(path), "generation_config": generation_settings(path)} | options
    with _quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True, **options
        )
    model, found = loaded
    missing, unexpected = set(found["missing_keys"]), set(found["unexpected_keys"])
    if missing or unexpected:
        raise UserError(f"the weights in {path} {_difference(missing, unexpected)}")
    if found["mismatched_keys"]:
        name, shape, wanted = min(found["mismatched_keys"])
        file = stored[name].file if name in stored else path
        raise UserError(f"{file}: {name} has the shape {[*shape]}, by config.json it has {[*wanted]}")
    return model


def stored_tensors(path: str | Path) -> dict[str, Stored]:
    """Return the tensors of a checkpoint by name, from the headers of its files; empty for a hub id not in the cache.

    Raises:
        UserError: a file is missing or cut off, its header is malformed, or weights are quantised.
    """
    found: dict[str, Stored] = {}
    for file in weight_files(path):
        with _opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no mapping)
                one = tensors.get_slice(name)
                found[name] = Stored(file, one.get_dtype(), tuple(one.get_shape()))
    for name, one in found.items():
        if name.endswith("weight") and one.dtype not in FLOATS:
            raise UserError(f"{one.file}: {name} has the type {one.dtype}, and only {', '.join(FLOATS)} can be trained")
    return found


def check_finite(path: str | Path) -> None:
    """Read all weights of a checkpoint once, one tensor after another.

    Raises:
        UserError: a value is NaN or infinite; the message names file and tensor.
    """
    for file in weight_files(path):
        with _opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no mapping)
                tensor = tensors.get_tensor(name)
                if tensor.dtype in FLOATS.values() and tensor.numel():
                    ends = torch.stack(torch.aminmax(tensor))  # NaN if any value is
                    if not ends.isfinite().all():
                        raise UserError(f"{file}: {name} has values that are NaN or infinite: use another checkpoint")


def weight_files(path: str | Path) -> list[Path]:
    """Return the files of a checkpoint that are loaded; none for a hub id that is not in the cache.

    Raises:
        UserError: there are none, the index can't be read, a file that it names is missing, or a link in the folder
            leads nowhere.
    """
    folder = Path(path)
    if not folder.is_dir():
        cached = try_to_load_from_cache(str(path), "config.json")
        if not isinstance(cached, str):
            return []
        folder = Path(cached).parent
    broken = [file.name for file in folder.iterdir() if not file.exists()]
    if broken:
        raise UserError(f"{folder}: {_listed(broken)} leads to no file: copy the checkpoint again, or remove the link")
    index = folder / INDEX
    for single in (folder / WHOLE, folder / ADAPTER):
        if single.is_file() and not (single.name == ADAPTER and index.is_file()):
            return [single]
    if not index.is_file():
        raise UserError(f"no weights in {path}: only safetensors are loaded, and there is no {WHOLE} and no {INDEX}")
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [folder / Path(name).name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} can't be read: {type(error).__name__}: {error}") from error
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{folder} lacks {_listed(missing)}, which {INDEX} names: copy the checkpoint again")
    return files


def _difference(missing: set[str], unexpected: set[str]) -> str:
    """Describe how stored names differ from the model's; at least one of the two sets has a name."""
    lack = f"lack {_listed(missing)}, which its config.json asks for"
    if not missing:
        return (
            f"have {_listed(unexpected)}, which its config.json has no place for: correct it, or remove these weights"
        )
    if not unexpected:
        return f"{lack}: copy the checkpoint again, or correct config.json"
    foreign = {part for name in unexpected for part in name.split(".")} - {p for n in missing for p in n.split(".")}
    for name in sorted(unexpected):
        before = next((name.removesuffix(m) for m in missing if name.endswith(f".{m}")), "")
        within = ".".join(part for part in name.split(".") if part in foreign)
        inside = ".".join(part for part in name.split(".") if part not in foreign)
        if before or (within and inside in missing):
            wrapper = before or within
            return f"{lack}: they have {wrapper!r} in their names, such as {name}; save the model inside that wrapper"
    return f"{lack}, and have {_listed(unexpected)} instead: config.json is another model's"


@contextmanager
def _opened(file: Path) -> Generator[Any]:
    """Open a safetensors file, which compares its header with its size."""
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} can't be read as safetensors ({error}): copy or download it again") from error


@contextmanager
def _quiet() -> Generator[None]:
    """Keep transformers' report of missing weights off the terminal: here they are an error."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _listed(names: Iterable[str]) -> str:
    found = sorted(names)
    more = f" and {len(found) - LISTED} more" if len(found) > LISTED else ""
    return ", ".join(found[:LISTED]) + more


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
