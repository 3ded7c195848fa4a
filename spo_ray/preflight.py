"""What can be refused before anything long starts."""

import json
from pathlib import Path

from spo_ray.config import Config
from spo_ray.data.read import on_hub
from spo_ray.data.sample import choose
from spo_ray.data_config import EngineConfig, TeacherModel
from spo_ray.errors import UserError
from spo_ray.run import say


def preflight(config: Config) -> None:
    """Check that the model and its chat template are there, and choose the engine.

    ``organisation/name`` is taken for a hub id unless a local folder ``organisation`` exists.

    Raises:
        UserError: saying what is missing.
    """
    name = config.model.path
    path, is_hub_id = Path(name), on_hub(Path(name))
    if not is_hub_id and not (path / "config.json").is_file():
        raise UserError(f"no model in {name} (no config.json there): set model.path to a directory or a hub id")
    from spo_ray.model.tokenise import ChatTokenizer  # takes seconds to import

    try:
        ChatTokenizer.load(name, config.model.chat_template)
    except UserError:
        raise
    except Exception as error:  # missing files, but also any mistake in a chat template
        raise UserError(f"the tokenizer of {name} can't be used: {str(error).splitlines()[0]}") from error
    if not is_hub_id:
        _check_files(config, path)
    engine, why = choose(config.engine)
    say("engine", f"{engine} ({why})")
    for teacher in config.sft_data.teachers:
        if isinstance(teacher, TeacherModel) and isinstance(teacher.engine, EngineConfig):
            choose(teacher.engine)
            if not on_hub(Path(teacher.model)) and not (Path(teacher.model) / "config.json").is_file():
                raise UserError(f"no teacher in {teacher.model} (no config.json there): set a directory or a hub id")


def _check_files(config: Config, path: Path) -> None:
    if not list(path.glob("*.safetensors")):
        raise UserError(f"no weights in {path}: only safetensors are loaded, and there is no *.safetensors file")
    positions = json.loads((path / "config.json").read_text()).get("max_position_embeddings")
    lengths = {"train.max_length": config.train.max_length, "engine.max_model_len": config.engine.max_model_len}
    for field, length in lengths.items():
        if positions and length > positions:
            raise UserError(f"{field}={length} is beyond the model's {positions} positions: lower it")
