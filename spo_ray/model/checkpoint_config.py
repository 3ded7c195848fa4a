"""Reads a checkpoint's configuration and generation settings so that they can be used and saved again."""

import json
import math
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file

from spo_ray.errors import UserError
from spo_ray.runtime.console import log

SETTINGS = "generation_config.json"
MOST_PARTS = 10_000
"""Most layers or experts of a model."""


def model_config(path: str | Path) -> PretrainedConfig:
    """Return the configuration of a checkpoint, without a padding token that is not in its embedding.

    Raises:
        UserError: a number is NaN or infinite, or there are more layers or experts than any model has, which would
            fill the memory.
    """
    _check_numbers(PretrainedConfig.get_config_dict(path)[0], path)
    config = AutoConfig.from_pretrained(path)
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        pad, rows = getattr(part, "pad_token_id", None), getattr(part, "vocab_size", None)
        if pad is not None and rows is not None and not 0 <= pad < rows:
            part.pad_token_id = None
    return config


def _check_numbers(settings: Mapping[str, Any], path: str | Path) -> None:
    for name, value in settings.items():
        if isinstance(value, dict):
            _check_numbers(value, path)
        elif isinstance(value, int) and re.search("layers|experts", name) and value > MOST_PARTS:
            raise UserError(f"config.json of {path}: {name}={value} is above {MOST_PARTS}: correct it")
        elif isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"config.json of {path}: {name}={value} is not finite: correct it")


def generation_settings(path: str | Path) -> GenerationConfig | None:
    """Return a checkpoint's generation settings, without the values that transformers refuses; None if it has none.

    Such a value is logged. Sampling parameters without ``do_sample`` set it, because they can't be saved otherwise.

    Raises:
        UserError: the file is not a JSON object.
    """
    try:
        file = str(cached_file(str(path), SETTINGS))
    except OSError:  # base models often have none
        return None
    try:
        values = json.loads(Path(file).read_text())
        GenerationConfig(**dict.fromkeys(values))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{file} can't be read ({error}): correct it, or remove it") from error
    sampled = {"do_sample": True}
    refused = {n: v for n, v in values.items() if not _accepted({n: v}) and not _accepted({n: v} | sampled)}
    kept = {name: value for name, value in values.items() if name not in refused}
    if refused:
        log("model", f"{file}: left out {', '.join(f'{name}={value!r}' for name, value in refused.items())}")
    tokens = {name: value for name, value in kept.items() if name.endswith("_token_id")}
    return GenerationConfig(**next(values for values in (kept, kept | sampled, tokens, {}) if _accepted(values)))


def rehearse_export(model: PreTrainedModel, path: str | Path) -> None:
    """Save a model without its weights, as the export does after training.

    Raises:
        UserError: transformers refuses a value of its configuration or generation settings.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder, state_dict={})
            AutoConfig.from_pretrained(folder)
        except Exception as error:  # whatever the export would raise after training
            reason = " ".join(str(error).split())
            raise UserError(f"the model in {path} could not be saved after training: {reason}") from error


def _accepted(values: dict[str, Any]) -> bool:
    try:
        GenerationConfig(**values).validate(strict=True)
    except (ValueError, TypeError, AttributeError):
        return False
    return True
