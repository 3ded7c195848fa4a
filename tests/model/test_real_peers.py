"""SmolLM2-135M-Instruct and real rows beside vLLM, transformers and TRL; and its memory."""

import copy
import gc
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoConfig

from benchmarks.common import elapsed
from spo_ray.config.data import EngineConfig
from spo_ray.config.load import load
from spo_ray.core.logps import completion_logps
from spo_ray.model.collate import collate, collate_pairs
from spo_ray.model.engines import TransformersEngine, VllmEngine
from spo_ray.model.load import build_policy, load_model
from spo_ray.model.memory import estimate_memory
from spo_ray.model.tokenizer import ChatTokenizer
from spo_ray.pipeline.plan import Estimator
from spo_ray.runtime.run import PlannedStage, Work

from ..core.test_against_trl import LOSSES, ours, step_of_trl
from ..core.tiny import relative_error
from .test_memory import QUICKSTART, peak_of_step, step_of
from .test_real_weights import LONGEST, MARGIN, short_rows

PER_TOKEN = 1e-3
"""Nats; largest difference of a row's log-probability divided by its tokens."""


@pytest.fixture(scope="module")
def chat(smollm2):
    return ChatTokenizer.load(smollm2)


@pytest.fixture(scope="module")
def pairs(chat, shared_data):
    return short_rows(chat, shared_data / "ultrafeedback" / "train.jsonl", 8)


@pytest.fixture(scope="module")
def questions(chat, shared_data):
    return short_rows(chat, shared_data / "gsm8k" / "train.jsonl", 8, ("question", "answer"))


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_gives_the_trainers_log_probabilities_and_transformers_greedy_text(smollm2, chat, pairs, questions):
    rows = [(row["prompt_ids"], row["chosen_ids"]) for row in (*pairs, *questions)]
    prompts = [prompt for prompt, _ in (*rows[:4], *rows[8:12])]
    greedy = {"n": 1, "temperature": 0.0, "max_tokens": 24, "seeds": [0] * len(prompts)}
    config = EngineConfig(max_model_len=2 * LONGEST)
    served = VllmEngine(str(smollm2), config, chat)
    scores = [found.logp for found in served.score(rows)]
    texts = [answer.ids for (answer,) in served.generate(prompts, **greedy)]
    served.close()
    plain = TransformersEngine(str(smollm2), config, chat)
    with torch.inference_mode():
        wanted = [completion_logps(plain.model, **collate([row], chat.pad_id))[0].item() for row in rows]
    differences = [abs(a - b) / len(ids) for a, b, (_, ids) in zip(scores, wanted, rows, strict=True)]
    print(f"vLLM against the trainer, nats a token: at most {max(differences):.1e}")
    assert max(differences) < PER_TOKEN
    assert texts == [answer.ids for (answer,) in plain.generate(prompts, **greedy)]


@pytest.mark.slow
@pytest.mark.parametrize("loss", [*LOSSES, "simpo"])
def test_loss_and_gradients_are_trls_on_real_pairs(smollm2, chat, pairs, tmp_path, loss):
    torch.manual_seed(0)
    model = load_model(smollm2)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(1 + 0.02 * torch.randn_like(parameter))
    rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in pairs[:4]]
    if loss == "simpo":
        found, options = simpo_of_trl(tmp_path, model, chat, pairs[:4], rows), {"beta": 2.0, "margin": MARGIN}
    else:
        policy = {"model": model, "rows": rows, "tokenizer": chat.tokenizer}
        found, options = step_of_trl(tmp_path, loss, reference, **policy), {"beta": 0.3}
    model.zero_grad()  # the found ones stay
    grads, metrics = ours(found["batch"], found["base"], model, **options)
    error = relative_error(grads.values(), [found["grads"][name] for name in grads])
    print(f"{loss}: loss {abs(metrics['loss'] / found['loss'] - 1):.1e}, gradients {error:.1e}")
    assert metrics["loss"] == pytest.approx(found["loss"], rel=1e-5)
    assert error < 1e-5
    del model, reference, found, grads
    gc.collect()  # TRL's trainers are in reference cycles with their models


def simpo_of_trl(folder, model, chat, pairs, rows):
    """SimPO is in TRL's CPO trainer, whose batches have the columns of ours."""
    import datasets
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    arguments = CPOConfig(
        output_dir=str(folder),
        loss_type="simpo",
        cpo_alpha=0.0,
        beta=2.0,
        simpo_gamma=MARGIN,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
    )
    rows = datasets.Dataset.from_list(rows)
    trainer = CPOTrainer(model=model, args=arguments, train_dataset=rows, processing_class=chat.tokenizer)
    batch = collate_pairs([row | {"ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0} for row in pairs], chat.pad_id)
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"batch": batch, "base": "simpo", "loss": loss.item(), "grads": grads}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dpo", "spo"])
def test_the_estimates_of_memory_and_time_beside_a_real_step(smollm2, chat, pairs, tmp_path, method):
    """Of the time, which other processes lengthen, the test asks only for the order of magnitude."""
    rows = [row | {"ref_chosen_logps": -50.0, "ref_rejected_logps": -50.0} for row in pairs[:4]]
    longest = max(len(row["prompt_ids"]) + len(row[f"{side}_ids"]) for row in rows for side in ("chosen", "rejected"))
    overrides = [f"train.max_length={longest}", "train.checkpoint.every=null", "preference.dynamics_every=null"]
    overrides += ["train.pairs_per_backward=1", "methods.spo.gamma=0", f"model.path={smollm2}", f"output={tmp_path}"]
    config = load(QUICKSTART, overrides)
    estimate = estimate_memory(config, AutoConfig.from_pretrained(smollm2), method, config.methods[method], "cpu")
    model = build_policy(smollm2, config.model, 0, with_phi=True)
    batch = collate_pairs(rows, chat.pad_id)
    peak = peak_of_step(model, config, method, batch)
    print(f"{method}: planned {estimate.total / 2**30:.2f} GiB, measured {peak / 2**30:.2f} GiB")
    assert estimate.total == pytest.approx(peak, rel=0.25)
    tokens = sum(int(batch[f"{side}_attention_mask"].sum()) for side in ("chosen", "rejected"))
    planned = Estimator(config).of(PlannedStage("method", "build", "", Work(tokens=tokens, trains=method))).seconds
    measured = elapsed(step_of(model, config, method, batch)[0])[0]
    print(f"{method}: planned {planned:.1f} s, measured {measured:.1f} s")
    assert measured / 5 < planned < measured * 5
