"""Checks of the files that a configuration names, before PyTorch, transformers or Ray are imported."""

from pathlib import Path
from typing import Any

from spo_ray.config.base import RowSource
from spo_ray.config.data import FileData, TeacherModel
from spo_ray.config.schema import Config
from spo_ray.data.read import data_files
from spo_ray.errors import UserError, first_line
from spo_ray.runtime.artifact import nearest, on_hub

HUB_S = 10.0
"""Seconds until the hub counts as unreachable."""


def check_data_paths(config: Config) -> None:
    """Check that the files of training and test data are there; of datasets on the hub nothing is checked.

    Raises:
        UserError: one is missing.
    """
    data = config.data
    sources: list[tuple[RowSource, str]] = []
    if isinstance(data, FileData):
        sources += [(place, place.train_split) for place in data.sources]
    if config.sft and config.sft.data:
        sources.append((config.sft.data, config.sft.data.train_split))
    for place, split in sources:
        if not on_hub(place.path):
            data_files(place.path, split)


def check_model_paths(config: Config) -> None:
    """Check that the model and local teachers are there: folders, or names that the hub knows.

    Raises:
        UserError: one is missing.
    """
    path = Path(config.model.path)
    if not on_hub(path) and not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        where = "" if path.is_absolute() else f", looked for in {Path.cwd()}"
        raise UserError(
            f"no model in {path} (no config.json there{where}){nearest(path)}: set model.path to a directory or a "
            "hub id"
        )
    if on_hub(path):
        _check_hub_id(config.model.path)
    for teacher in config.sft_data.teachers:
        if isinstance(teacher, TeacherModel):
            check_local("teacher", teacher.model, teacher.engine.type)


def check_local(what: str, model: str, engine: str) -> None:
    """Check that a teacher or judge that is no hub id and has no endpoint is a folder with a model."""
    path = Path(model)
    if engine != "endpoint" and not on_hub(path) and not (path / "config.json").is_file():
        raise UserError(f"no {what} in {model} (no config.json there){nearest(path)}: set a directory or a hub id")


def _check_hub_id(name: str) -> None:
    """Check that a model is in the hub's cache or on the hub; one request, where transformers would repeat it."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import RepositoryNotFoundError

    files = ("config.json", "adapter_config.json")
    if any(isinstance(try_to_load_from_cache(name, file), str) for file in files):
        return
    absent = f"there is no folder {name} in {Path.cwd()}, and "
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{absent}no model of that name in the hub's cache (HF_HUB_OFFLINE is set)")
    try:
        api: Any = HfApi()
        api.model_info(name, timeout=HUB_S)
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{absent}the hub has no such model: correct model.path; a private one needs HF_TOKEN"
        ) from error
    except Exception as error:  # of the network; its classes depend on the version
        raise UserError(f"{absent}the hub can't be reached: {first_line(error)}") from error
