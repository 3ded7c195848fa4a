"""The configuration schema: one YAML file, complete, plus dotted overrides.

``load(path, overrides)`` gives one frozen :class:`Config`. An unknown key is an error that names its line and the
nearest valid key. Every field is documented where it stands.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    BaseModel,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import YAMLError

from spo_ray.data_config import (
    DataConfig,
    EngineConfig,
    PairsConfig,
    PreferenceData,
    SamplingConfig,
    SftDataConfig,
)
from spo_ray.errors import UserError
from spo_ray.method_config import MethodConfig, MethodName, Spo
from spo_ray.section import Section
from spo_ray.train_config import Fraction, PreferenceConfig, SftConfig, TrainConfig


class RayConfig(Section):
    """Which cluster to use."""

    address: str | None = None
    """Cluster to join; None joins the one named by ``RAY_ADDRESS``, else starts a local one."""
    num_cpus: PositiveInt | None = None
    """Logical CPUs of a cluster started here; None: the cores, and at least 4."""
    worker_logs: bool = False
    """Show what the workers print; errors are shown in any case."""


class WholeBackbone(Section):
    """theta is every weight of the backbone."""

    type: Literal["all"] = "all"


class LastLayers(Section):
    """theta is the backbone's last layers; the rest is frozen."""

    type: Literal["last_layers"]
    count: PositiveInt = 4


class SecondAdapter(Section):
    """theta is a LoRA adapter of its own beside phi's; the backbone is frozen."""

    type: Literal["adapter"]
    rank: PositiveInt = 32
    alpha: PositiveInt = 64


ThetaConfig = Annotated[WholeBackbone | LastLayers | SecondAdapter, Field(discriminator="type")]


class ModelConfig(Section):
    """The base model and its adapters."""

    path: str
    """A local directory, or a hub id."""
    chat_template: str | None = None
    """Jinja text that replaces the tokenizer's template."""
    max_template_mismatch: Fraction = 0.05
    """Share of rows for which the template may give other tokens than prompt and completion by themselves; see
    ``spo-ray inspect``."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """Attention implementation; auto: FlashAttention 2 where it is installed and computes bfloat16, else PyTorch's."""
    theta: ThetaConfig = WholeBackbone()
    """What SFT trains, and SPO's lower level."""
    lora_rank: PositiveInt = 8
    lora_alpha: PositiveInt = 16
    lora_targets: str | list[str] = "all-linear"
    export_adapter: bool = False
    """Beside a method's merged checkpoint write its backbone, and phi as a PEFT adapter (`backbone`, `adapter`)."""


class EvalConfig(Section):
    """Accuracy on held-out questions by generation."""

    seeds: list[int] = Field(default=[0, 1, 2], min_length=1)
    """One sampled answer per question and seed."""
    temperature: PositiveFloat = 0.7
    max_tokens: PositiveInt = 256
    batch_size: PositiveInt = 256
    """Questions per engine call."""


class Config(Section):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """The run's folder under ``output``."""
    output: Path = Path("runs")
    seed: int = 0
    ray: RayConfig = RayConfig()
    data: DataConfig
    model: ModelConfig
    engine: EngineConfig = EngineConfig()
    sampling: SamplingConfig = SamplingConfig()
    sft_data: SftDataConfig = SftDataConfig()
    pairs: PairsConfig = PairsConfig()
    train: TrainConfig = TrainConfig()
    sft: SftConfig = SftConfig()
    preference: PreferenceConfig = PreferenceConfig()
    rounds: PositiveInt = 1
    """Rounds of sampling, pairing and training; each method's further rounds go on from its own last checkpoint."""
    methods: dict[MethodName, MethodConfig] = Field(min_length=1)
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _fields_agree(self) -> "Config":
        if self.sft_data.pass_k > self.sampling.samples:
            raise ValueError(f"sft_data.pass_k={self.sft_data.pass_k} needs as many sampling.samples")
        if self.rounds > 1 and isinstance(self.data, PreferenceData):
            raise ValueError("rounds sample new pairs, and need questions: with preference data, set rounds=1")
        if self.train.cpu_offload and self.train.sharding == "none":
            raise ValueError("train.cpu_offload needs train.sharding=full")
        sharded = self.train.sharding == "full" and (self.train.num_workers > 1 or self.train.cpu_offload)
        for name, method in self.methods.items():
            if sharded and isinstance(method, Spo) and method.gamma > 0 and method.hinge == "pair":
                raise ValueError(f"methods.{name}.hinge=pair needs train.sharding=none: sharded passes sum over pairs")
        return self


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply ``key.sub=value`` overrides and validate.

    Raises:
        UserError: the file is missing or no YAML mapping, an override is malformed, or a field is unknown or wrong.
    """
    yaml = YAML(typ="rt")
    try:
        tree = yaml.load(Path(path).read_text())
    except FileNotFoundError as error:
        raise UserError(f"no configuration file {path}: see configs/ for complete examples") from error
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise UserError(f"{path} can't be read as YAML: {error}") from error
    if not isinstance(tree, CommentedMap):
        raise UserError(f"{path} must hold a mapping of configuration keys")
    for override in overrides:
        _apply(tree, override)
    try:
        return Config.model_validate(_plain(tree))
    except ValidationError as error:
        raise UserError(_explain(error, tree, str(path))) from error


def _plain(node: Any) -> Any:
    if isinstance(node, dict):
        return {str(key): _plain(value) for key, value in node.items()}
    return [_plain(value) for value in node] if isinstance(node, list) else node


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {override!r} must look like key.sub=value")
    *parents, last = key.split(".")
    node: Any = tree
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = CommentedMap()
        node = node[parent]
        if not isinstance(node, dict):
            raise UserError(f"override {override!r}: {parent} holds a value, not a section")
    try:
        node[last] = YAML(typ="safe").load(text)
    except YAMLError as error:
        raise UserError(f"override {override!r}: the value is no YAML: {error}") from error


def _explain(error: ValidationError, tree: CommentedMap, path: str) -> str:
    lines = []
    for item in error.errors():
        where = [part for part in item["loc"] if part != "[key]"]
        key = _drop_tags(where, tree)
        line = _line(tree, key)
        text = f"{path}{f':{line}' if line else ''}: " + (f"{'.'.join(map(str, key))}: " if key else "")
        if item["type"] == "extra_forbidden":
            known = _fields(key[:-1], tree)
            near = difflib.get_close_matches(str(key[-1]), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
            text += f"unknown key; {hint}"
        else:
            given = "" if isinstance(item["input"], dict) else f" (given: {item['input']!r})"
            text += item["msg"] + given
        lines.append(text)
    return "\n".join(lines)


def _drop_tags(where: Sequence[int | str], tree: Any) -> list[int | str]:
    """Pydantic puts a union's tag into the location; keep only what stands in the file, and the last part."""
    kept: list[int | str] = []
    node = tree
    for index, part in enumerate(where):
        inside = (isinstance(node, dict) and part in node) or (isinstance(node, list) and isinstance(part, int))
        if inside:
            node = node[part]
        elif index < len(where) - 1:
            continue
        kept.append(part)
    return kept


def _line(tree: Any, key: Sequence[int | str]) -> int | None:
    """Line (from 1) of the deepest part of ``key`` that stands in the file."""
    line, node = None, tree
    for part in key:
        position = getattr(node, "lc", None)
        if position is None or not isinstance(node, dict) or part not in node:
            break
        found = (position.data or {}).get(part)
        line = found[0] + 1 if found else line
        node = node[part]
    return line


def _fields(key: Sequence[int | str], tree: Any) -> list[str]:
    """Valid field names of the section at ``key``."""
    annotation: Any = Config
    node = tree
    for part in key:
        if get_origin(annotation) is dict:
            annotation = get_args(annotation)[1]
        else:
            annotation = _section(annotation, node).model_fields[str(part)].annotation
        node = node[part]
    return list(_section(annotation, node).model_fields)


def _section(annotation: Any, node: Any) -> Any:
    """The section class that an annotation means for this node of the file."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    candidates = _leaf_sections(annotation)
    tagged = [c for c in candidates if node.get("type") in getattr(c.model_fields["type"].annotation, "__args__", ())]
    return (tagged or candidates)[0]


def _leaf_sections(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [leaf for argument in getattr(annotation, "__args__", ()) for leaf in _leaf_sections(argument)]
