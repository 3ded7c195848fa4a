"""The configuration schema: one YAML file, complete, plus dotted overrides.

``load(path, overrides)`` gives one frozen :class:`Config`. An unknown key is an error that names its line and the
nearest valid key. Every field is documented where it stands.
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, Field, PositiveInt, ValidationError, field_validator, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import YAMLError

from spo_ray.data_config import DataConfig, EngineConfig, PairsConfig, PreferenceData, SamplingConfig, SftDataConfig
from spo_ray.errors import UserError
from spo_ray.eval_config import EvalConfig
from spo_ray.method_config import MethodConfig, MethodName, Spo
from spo_ray.redact import is_secret
from spo_ray.section import Section
from spo_ray.sweep_config import SweepConfig, space_problems, unmeasured
from spo_ray.track_config import TrackingConfig
from spo_ray.train_config import Fraction, PreferenceConfig, SftConfig, TrainConfig

PASSED_ENV = [
    "HF_HUB_OFFLINE",
    "HF_ENDPOINT",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "NCCL_DEBUG",
    "NCCL_SOCKET_IFNAME",
    "GLOO_SOCKET_IFNAME",
    "AWS_ENDPOINT_URL",
    "AWS_DEFAULT_REGION",
]


class RayConfig(Section):
    """Which cluster to use."""

    address: str | None = None
    """Cluster to join; None joins the one named by ``RAY_ADDRESS``, else starts a local one."""
    num_cpus: PositiveInt | None = None
    """Logical CPUs of a cluster started here; None: the cores, and at least 4."""
    worker_logs: bool = False
    """Show what the workers print; errors are shown in any case."""
    pass_env: list[str] = PASSED_ENV
    """Environment variables that a cluster's workers get from this process, where they are set; all others are those of
    the nodes. Secrets are not allowed: they would stand in the job's description."""

    @field_validator("pass_env")
    @classmethod
    def _no_secrets(cls, value: list[str]) -> list[str]:
        for name in value:
            if is_secret(name):
                raise ValueError(f"{name} may be a secret: set it in the environment of the nodes instead")
        return value


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
    tracking: TrackingConfig = TrackingConfig()
    sweep: SweepConfig | None = None
    """For ``pipelines/sweep.py``; all other scripts take no notice of it."""

    @model_validator(mode="after")
    def _fields_agree(self) -> "Config":
        if self.sft_data.pass_k > self.sampling.samples:
            raise ValueError(f"sft_data.pass_k={self.sft_data.pass_k} needs as many sampling.samples")
        if self.rounds > 1 and isinstance(self.data, PreferenceData):
            raise ValueError("rounds sample new pairs, and need questions: with preference data, set rounds=1")
        if "accuracy" in (self.eval.suites or []) and isinstance(self.data, PreferenceData):
            raise ValueError("suite accuracy needs questions: with preference data, leave it out of eval.suites")
        if self.train.cpu_offload and self.train.sharding == "none":
            raise ValueError("train.cpu_offload needs train.sharding=full")
        alarm = self.preference.alarm.on_alarm
        if alarm == "increase_lambda" and not any(isinstance(m, Spo) and m.lambda_sft for m in self.methods.values()):
            raise ValueError("preference.alarm.on_alarm=increase_lambda needs a method of type spo with lambda_sft > 0")
        sharded = self.train.sharding == "full" and (self.train.num_workers > 1 or self.train.cpu_offload)
        for name, method in self.methods.items():
            if sharded and isinstance(method, Spo) and method.gamma > 0 and method.hinge == "pair":
                raise ValueError(f"methods.{name}.hinge=pair needs train.sharding=none: sharded passes sum over pairs")
        return self

    @model_validator(mode="after")
    def _best_is_measured(self) -> "Config":
        checkpoint, kinds = self.train.checkpoint, {"probe": "probe_every", "health": "health_every"}
        if checkpoint.best is None:
            return self
        if checkpoint.every is None:
            raise ValueError("train.checkpoint.best is chosen among checkpoints: set train.checkpoint.every")
        metric = checkpoint.best.metric
        field = kinds.get(metric.partition("/")[0])
        every = getattr(self.preference, field) if field else 1
        if every is None or checkpoint.every % every:
            raise ValueError(
                f"train.checkpoint.best.metric={metric} is measured every preference.{field}={every} steps: "
                f"train.checkpoint.every={checkpoint.every} must be a multiple of that"
            )
        return self

    @model_validator(mode="after")
    def _sweep_fits(self) -> "Config":
        if self.sweep is None:
            return self
        if self.sweep.method not in self.methods:
            raise ValueError(f"sweep.method={self.sweep.method} is none of the methods: {', '.join(self.methods)}")
        if self.preference.alarm.on_alarm == "stop":
            raise ValueError(
                "preference.alarm.on_alarm=stop would end trials before they are scored: set sweep.max_fall"
            )
        suites = self.eval.chosen(self.data)
        wrong = unmeasured(self.sweep, suites)
        if wrong:
            raise ValueError(f"sweep.objectives: {wrong[0]} is measured by none of the suites {', '.join(suites)}")
        if isinstance(self.data, PreferenceData) and not self.sweep.validation.pairs:
            raise ValueError("preference data is validated on pairs: set sweep.validation.pairs")
        annotators = self.eval.alpaca.annotators if self.eval.alpaca else []
        if any(isinstance(annotator.engine, EngineConfig) for annotator in annotators):
            raise ValueError(
                "a sweep has room for judges at endpoints alone: give every annotator engine.type=endpoint"
            )
        if self.preference.alarm.on_alarm == "stop":
            raise ValueError("a sweep's trials are stopped by sweep.max_fall: set preference.alarm.on_alarm=warn")
        if self.rounds > 1:
            raise ValueError("a sweep's trials have one round: set rounds=1")
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
        config = Config.model_validate(_plain(tree))
    except ValidationError as error:
        raise UserError(_explain(error, tree, str(path), overrides)) from error
    problems = list(space_problems(config)) if config.sweep else []
    if problems:
        lines = [(f"{path}:{_line(tree, ['sweep', 'space', key])}", key, text) for key, text in problems]
        raise UserError("\n".join(f"{where}: sweep.space.{key}: {text}" for where, key, text in lines))
    return config


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


def _given(key: Sequence[int | str], overrides: Sequence[str]) -> bool:
    """Whether an override is about this key, or has it in its value."""
    name = ".".join(map(str, key))
    return any(f"{name}.".startswith(f"{override.partition('=')[0]}.") for override in overrides)


def _explain(error: ValidationError, tree: CommentedMap, path: str, overrides: Sequence[str]) -> str:
    lines = []
    for item in error.errors():
        where = [part for part in item["loc"] if part != "[key]"]
        key = _drop_tags(where, tree)
        line = _line(tree, key)
        place = "command line" if _given(key, overrides) else f"{path}{f':{line}' if line else ''}"
        text = f"{place}: " + (f"{'.'.join(map(str, key))}: " if key else "")
        if item["type"] == "extra_forbidden":
            known = _fields(key[:-1], tree)
            near = difflib.get_close_matches(str(key[-1]), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
            text += f"unknown key; {hint}"
        else:
            given = "" if isinstance(item["input"], dict) else f" (given: {item['input']!r})"
            text += item["msg"] + given + _nearest_value(item)
        lines.append(text)
    return "\n".join(lines)


def _nearest_value(item: Any) -> str:
    """A hint for a word that is none of the allowed ones."""
    allowed = re.findall(
        "'([^']+)'", str(item.get("ctx", {}).get("expected", item.get("ctx", {}).get("expected_tags")))
    )
    given = item["input"].get("type") if isinstance(item["input"], dict) else item["input"]
    near = difflib.get_close_matches(str(given), allowed, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


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
