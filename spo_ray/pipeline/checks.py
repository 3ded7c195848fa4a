"""Checks of a configuration before the job starts."""

import json
import os
from pathlib import Path
from urllib.parse import urlsplit

from spo_ray.config.data import EndpointConfig, EngineConfig, TeacherModel
from spo_ray.config.evaluate import LM_EVAL, AlpacaConfig
from spo_ray.config.schema import Config
from spo_ray.errors import UserError, first_line
from spo_ray.evaluate.alpaca import read_instructions
from spo_ray.evaluate.judge import read_template
from spo_ray.evaluate.lm_eval import known_task
from spo_ray.model.adapter import ModelSource
from spo_ray.model.checkpoint_files import check_checkpoint
from spo_ray.model.completion import choose_engine
from spo_ray.model.tokenizer import ChatTokenizer
from spo_ray.pipeline.paths import check_local, check_model_paths
from spo_ray.runtime.artifact import on_hub
from spo_ray.runtime.console import log
from spo_ray.runtime.tracking import check_trackers
from spo_ray.train.method_state import check_own_loss


def preflight(config: Config) -> None:
    """Check trackers, model, chat template, engines and evaluation.

    ``organisation/name`` is a hub id unless a local folder ``organisation`` exists.

    Raises:
        UserError: something is missing or can't be used.
    """
    check_model_paths(config)
    check_trackers(config.tracking)
    source = ModelSource.of(config.model)
    name = str(source.model)
    path, is_hub_id = Path(name), on_hub(Path(name))
    if not is_hub_id and not (path / "config.json").is_file():  # an adapter's base model
        raise UserError(f"no model in {name} (no config.json there): set model.path to a directory or a hub id")
    try:
        ChatTokenizer.load(source.tokenizer, config.model, name).check_opening()
    except UserError:
        raise
    except Exception as error:  # missing files, but also any mistake in a chat template
        raise UserError(f"the tokenizer of {name} can't be used: {first_line(error)}") from error
    source.check()
    if not is_hub_id:
        _check_lengths(config, path)
    engine, why = choose_engine(config.engine)
    log("engine", f"answers come from {engine} ({why})")
    for teacher in config.sft_data.teachers:
        if isinstance(teacher, TeacherModel):
            _check_engine("teacher", teacher.model, teacher.engine)
    for method, settings in config.methods.items():
        check_own_loss(method, settings)
    check_evaluation(config)


def check_evaluation(config: Config) -> None:
    """Check the keys, templates and tasks of the suites, which are used only after training.

    Raises:
        UserError: one of them is missing or unknown.
    """
    for suite in config.eval.chosen(config.data):
        if suite.startswith(LM_EVAL):
            known_task(suite.removeprefix(LM_EVAL), config.eval.lm_eval)
        elif suite == "alpaca_eval" and config.eval.alpaca:
            _check_judges(config.eval.alpaca)


def _check_engine(what: str, model: str, engine: EngineConfig | EndpointConfig) -> None:
    """Check that an endpoint has its key, or that a local model and an engine for it are there."""
    if isinstance(engine, EndpointConfig):
        local = urlsplit(engine.url).hostname in ("localhost", "127.0.0.1", "::1")
        if not local and engine.api_key_env not in os.environ:
            raise UserError(f"{what} {model} at {engine.url}: there is no key; export {engine.api_key_env}")
        return
    choose_engine(engine)
    check_local(what, model, engine.type)
    check_checkpoint(model)


def _check_judges(config: AlpacaConfig) -> None:
    if not on_hub(config.instructions):
        read_instructions(config)
    for annotator in config.annotators:
        read_template(annotator)
        _check_engine("annotator", annotator.model, annotator.engine)


def _check_lengths(config: Config, path: Path) -> None:
    positions = json.loads((path / "config.json").read_text()).get("max_position_embeddings")
    lengths = {"train.max_length": config.train.max_length, "engine.max_model_len": config.engine.max_model_len}
    for field, length in lengths.items():
        if positions and length > positions:
            raise UserError(f"{field}={length} is beyond the model's {positions} positions: lower it")
