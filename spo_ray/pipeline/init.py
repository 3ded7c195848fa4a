"""``spo-ray init``: a small commented configuration for preference pairs, from three answers."""

import json
import os
import re
import sys
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from cyclopts import Parameter

from spo_ray.errors import UserError, first_line
from spo_ray.pipeline.command import guarded
from spo_ray.runtime.artifact import nearest, on_hub, write_answer
from spo_ray.runtime.console import show

Machine = Literal["cpu", "gpu"]


class Rates(NamedTuple):
    """Peak learning rates for models up to a size."""

    parameters: float
    sft: str
    theta: str
    phi: str


RATES = (
    Rates(5e7, "1e-4", "1e-4", "1e-4"),
    Rates(4e8, "5e-5", "5e-6", "5e-5"),
    Rates(4e9, "2e-5", "1e-6", "1e-5"),
    Rates(float("inf"), "1e-5", "5e-7", "5e-6"),
)
"""SFT of all weights, then theta (all weights) and phi (LoRA) on pairs. Larger models take smaller rates: TRL's default
is 1e-6 for DPO of all weights, the Zephyr recipe's 5e-7 for 7B, and LoRA takes about ten times the rate of all weights
(Schulman et al., "LoRA Without Regret", 2025). Toy models forget nothing that is worth keeping."""
LONGEST_HEADER = 10**8
"""Bytes that safetensors allows for the header of a file."""
UNKNOWN = 1e9
"""Parameters of a model whose size can't be seen here."""
TEMPLATE = """\
# Preference optimization of {model} on your own pairs.
#   spo-ray plan --config {file}   shows what it would take
#   spo-ray run --config {file}    trains, evaluates and writes the report
# {size}; written for a {machine}. docs/configuration.md has every setting.
name: {name}
data:
  type: preference
  path: {data} # one JSON object a line: prompt, chosen, rejected; docs/data.md has other forms
model:
  path: {model} # a folder with config.json, tokenizer and *.safetensors, or a name on the hub
engine: {{dtype: {dtype}{engine_cpus}}} # {why_dtype}
pairs: {{dedup: normalised}} # the same pair twice could stand in training and in the test
train:
  precision: {dtype} # of the passes; weights and AdamW's states stay float32
  max_length: 1024 # tokens of prompt and answer; longer pairs are left out and counted, never cut
  gradient_checkpointing: {checkpointing} # {why_checkpointing}
{worker_cpus}sft:
  lr: {rates.sft} # learns the chosen answers first, so that the pairs are near what the model writes
  epochs: 1 # more passes begin to learn answers by heart
preference:
  batch_size: 32 # pairs a step, accumulated from as many as fit (train.pairs_per_backward); smaller ones are noisy
  theta: {{lr: {rates.theta}}} # all weights
  phi: {{lr: {rates.phi}}} # LoRA{lora}
  epochs: 1 # a second pass over the same pairs mostly pushes probabilities down
methods:
  dpo: {{type: dpo, beta: 0.1}} # the field's usual beta; the paper has 0.5, which stays nearer to the reference
  dpo_nll: {{type: dpo_nll, beta: 0.1, sft_reduction: token_mean}} # simpler, and the one to beat
  spo:
    type: spo
    base: {{type: dpo, beta: 0.1}} # the same beta, so that they can be compared
    sft_reduction: token_mean # a mean per token is about 1 nat, as the DPO term is, whatever the answers' length
    lambda_sft: 1.0 # so both terms weigh alike; with sft_reduction sum divide it by an answer's tokens
eval:
  suites: [health] # add alpaca_eval or lm_eval:TASK (docs/evaluation.md)
  health_prompts: 32 # answers that are looked at for repetition and length
"""


def init(
    file: Path = Path("run.yaml"),
    *,
    data: str | None = None,
    model: str | None = None,
    machine: Machine | None = None,
    force: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Write a small commented configuration for preference pairs; what no option says is asked on the terminal.

    Parameters
    ----------
    file
        The file to write.
    data
        File of pairs (.jsonl, .parquet), folder with train.jsonl, or dataset on the hub.
    model
        Folder of an instruction-tuned model, or its name on the hub.
    machine
        Where it is to run: cpu or gpu.
    force
        Replace the file if it is there.
    """

    def work() -> None:
        if file.exists() and not force:
            raise UserError(f"{file} is there already: name another file, or replace it with --force")
        pairs = data or _ask("data", "Preference pairs (a .jsonl or .parquet file, a folder, a hub name)")
        base = model or _ask("model", "Model (a folder or a hub name)")
        for what, path in (("data", Path(pairs)), ("model", Path(base))):
            if not path.exists() and not on_hub(path):
                raise UserError(f"--{what}: there is no file or folder {path}{nearest(path)}")
        place = machine or _ask("machine", "Machine (cpu or gpu)", "cpu", lambda text: text in ("cpu", "gpu"))
        write_answer(file, text_for(file, pairs, base, place))
        show(f"{file} is written. Next: spo-ray inspect --config {file} --data {pairs}, spo-ray plan --config {file}")

    return guarded(work)


def text_for(file: Path, data: str, model: str, machine: str) -> str:
    """Return the text of a configuration for pairs, a model and a machine (``cpu`` or ``gpu``)."""
    count, gpu, cores = parameters(model), machine == "gpu", os.cpu_count() or 1
    rates = next(rates for rates in RATES if (count or UNKNOWN) <= rates.parameters)
    size = f"{(count or UNKNOWN) / 1e6:,.1f}M parameters"
    dtype = "bfloat16" if gpu else "float32"
    large = gpu or (count or UNKNOWN) > RATES[0].parameters
    return TEMPLATE.format(
        **{
            "model": _quoted(model),
            "data": _quoted(data),
            "file": _quoted(str(file)),
            "machine": machine.upper(),
            "rates": rates,
            "dtype": dtype,
        },
        size=size if count else f"its size can't be seen here, and the rates are those of {size}",
        name=re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).strip("-._") or "run",
        why_dtype="half the memory, on hardware that has it" if gpu else "most CPUs are slower in bfloat16",
        checkpointing=str(large).lower(),
        why_checkpointing="a third more time, and a fraction of the memory" if large else "so small a model fits",
        engine_cpus="" if gpu else f", cpus: {cores}",
        worker_cpus="" if gpu else f"  cpus_per_worker: {cores} # all cores: a worker computes with as many threads\n",
        lora=" takes ten times the rate of all weights" if rates.theta != rates.phi else "",
    )


def _quoted(text: str) -> str:
    """Return a name as YAML, in quotes if a character could mean something else."""
    return text if re.fullmatch(r"[\w./~][\w./~+-]*", text) else json.dumps(text)


def parameters(model: str) -> int | None:
    """Return the number of a model's parameters, by the headers of its files or a name such as 0.5B, or None."""
    files = sorted(Path(model).glob("*.safetensors"))
    if files:
        try:
            return sum(map(_stored, files))
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:  # any content
            raise UserError(f"the weights of {model} can't be read: {first_line(error)}") from error
    named = re.findall(r"(?<![\w.])(\d+(?:\.\d+)?)([mb])(?![a-z])", model, re.IGNORECASE)
    return int(float(named[-1][0]) * {"m": 1e6, "b": 1e9}[named[-1][1].lower()]) if named else None


def _stored(file: Path) -> int:
    """Return the number of values in a safetensors file; its header is JSON behind its length in 8 bytes."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(min(LONGEST_HEADER, int.from_bytes(stream.read(8), "little"))))
    return sum(prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def _ask(option: str, question: str, default: str = "", valid: Callable[[str], bool] = bool) -> str:
    """Return the answer to a question on the terminal.

    Raises:
        UserError: there is no terminal.
    """
    if not sys.stdin.isatty():
        raise UserError(f"without a terminal nothing can be asked: set --{option} ({question})")
    while True:
        answer = input(f"{question}{f' [{default}]' if default else ''}: ").strip() or default
        if valid(answer):
            return answer
