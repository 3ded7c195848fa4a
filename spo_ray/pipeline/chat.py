"""``spo-ray chat``: the checkpoints of a run answer in the terminal."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from spo_ray.config.schema import Config
from spo_ray.errors import UserError
from spo_ray.runtime.console import set_verbosity, show


def chat(
    run: Path,
    *checkpoints: str,
    message: Annotated[list[str], Parameter(name=["--message", "-m"])] = [],  # noqa: B006 (cyclopts reads it)
    temperature: Annotated[float, Parameter(validator=Number(gte=0))] = 0.7,
    max_tokens: Annotated[int, Parameter(validator=Number(gt=0))] = 256,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> int:
    """Talk to checkpoints of a run; several answer side by side. An empty line ends it, /new starts anew.

    Example: spo-ray chat runs/quickstart dpo spo -m "Ada owns 3 pens and finds 4 more. How many pens does Ada own now?"

    Parameters
    ----------
    run
        Folder of a run, such as runs/quickstart.
    checkpoints
        Names as in the report, such as spo, sft or base.
    message
        A message instead of those that are typed; more than once for a conversation.
    temperature
        0: the most probable token at each step.
    max_tokens
        Length of an answer, at most.
    dtype
        Type of weights and computation.
    """
    try:
        _talk(run, checkpoints, message, temperature, max_tokens, dtype)
    except UserError as error:
        show(f"error: {error}", error=True)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _talk(
    run: Path, names: tuple[str, ...], messages: list[str], temperature: float, max_tokens: int, dtype: str
) -> None:
    from spo_ray.pipeline.finished import read_config

    config = read_config(run)
    paths = [_checkpoint(run, config, name) for name in names]
    if not paths:
        raise UserError(f"name one or several checkpoints: {', '.join(_known(run, config))}")
    set_verbosity(False)
    from rich.console import Console

    from spo_ray.model.chat import Speaker, converse

    speakers = {name: Speaker(path, config.model, dtype) for name, path in zip(names, paths, strict=True)}
    converse(speakers, messages or _typed(), temperature, max_tokens, Console(markup=False, highlight=False))


def _typed() -> Iterator[str]:
    try:
        while question := input("> ").strip():
            yield question
    except EOFError:
        return


def _known(run: Path, config: Config) -> list[str]:
    """Return the names of the checkpoints that are there."""
    return [name for name in ("base", "sft", *config.methods) if name == "base" or _folder(run, config, name).is_dir()]


def _folder(run: Path, config: Config, name: str) -> Path:
    """Return the folder of a method's last round, or of SFT."""
    suffix = f"_round{config.rounds}" if config.rounds > 1 else ""
    return run / (name if name == "sft" else f"method_{name}{suffix}")


def _checkpoint(run: Path, config: Config, name: str) -> str:
    """Return the folder or the hub id of a checkpoint.

    Raises:
        UserError: there is none of that name.
    """
    known = _known(run, config)
    if name not in known:
        raise UserError(f"{run} has no checkpoint {name}: it has {', '.join(known)}")
    merged = run / "base_model"  # where the run's model is an adapter
    return str(merged if merged.is_dir() else config.model.path) if name == "base" else str(_folder(run, config, name))
