"""SPOTrainer against the pipeline's own step, and what a Trainer must do besides: accumulate, save, resume."""

import copy
import dataclasses
import math
import re

import pytest
import torch
import trl
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainingArguments
from trl import DPOConfig

from spo_ray.config.load import load
from spo_ray.config.methods import Spo
from spo_ray.core.logps import completion_logps
from spo_ray.errors import UserError
from spo_ray.hf import SPOConfig, SPOTrainer, merged
from spo_ray.model.collate import collate_pairs
from spo_ray.model.load import PHI, build_policy, parameter_groups
from spo_ray.runtime.schema import SIDES
from spo_ray.train.callbacks import DynamicsCallback
from spo_ray.train.distributed import Distributed
from spo_ray.train.logp_eval import Measure
from spo_ray.train.method_state import Method
from spo_ray.train.worker import preference_gradients

from .conftest import ROOT

ROWS = [
    {
        "prompt": f"Ada owns {a} pens and finds {b} more. How many pens does Ada own now?",
        "chosen": f"{a} + {b} = {a + b}.\n#### {a + b}",
        "rejected": f"{a} - {b} = {a - b}.\n#### {a - b}",
    }
    for a, b in ((12, 3), (20, 11), (9, 4), (15, 6))
]
SETTINGS = {"lambda_sft": 2.0, "gamma": 0.01, "eta": 1e-3, "beta": 0.3}


class Watch(TrainerCallback):
    """The gradients of each step."""

    def __init__(self):
        self.grads = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.grads.append({name: p.grad.clone() for name, p in model.named_parameters()})


def trainer_of(model, folder, rows=ROWS, peft_config=None, **options):
    defaults = {"per_device_train_batch_size": 2, "max_steps": 1, "max_grad_norm": 0.0, "logging_steps": 1}
    defaults |= {"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True} | SETTINGS
    watch, held_out = Watch(), options.pop("eval_dataset", None)
    args = SPOConfig(output_dir=str(folder), **defaults | options)
    torch.manual_seed(0)  # the adapters' start is random
    trainer = SPOTrainer(
        model, args, train_dataset=rows, eval_dataset=held_out, peft_config=peft_config, callbacks=[watch]
    )
    return trainer, watch


def fields_of(config):
    return {field.name: field.default for field in dataclasses.fields(config)}


def test_every_field_of_trls_config_has_a_line_in_the_documentation():
    page = (ROOT / "docs" / "trl.md").read_text()
    theirs, inherited = fields_of(DPOConfig), fields_of(TrainingArguments)
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == sorted(theirs.keys() - inherited.keys())
    assert f"Fields of TRL {'.'.join(trl.__version__.split('.')[:2])};" in page
    ours, sentence = fields_of(SPOConfig), page.partition("Four inherited fields")[2].partition("`ref_model`")[0]
    changed = {name for name in inherited if theirs[name] != ours[name]}
    assert set(re.findall(r"`([a-z]\w+)`", sentence)) == changed
    for cell in re.findall(r"^\| `\w+` \|([^|]*)\|", page, re.MULTILINE):
        assert set(re.findall(r"`(\w+)`", cell)) <= ours.keys() | {"sft"}


@pytest.fixture
def model(toy_base):
    return AutoModelForCausalLM.from_pretrained(toy_base, dtype=torch.float32)


class Rows(list):
    """The pipeline's table of rows."""

    def rows(self, numbers):
        return [self[number] for number in numbers]


def test_a_step_is_the_pipelines_own(model, toy_base, tmp_path, in_root):
    """The same pairs, weights and settings: gradients, metrics, and parameters after AdamW's step."""
    spo = "methods={spo: {type: spo, lambda_sft: 2.0, gamma: 0.01, inner: {eta: 1e-3}, base: {type: dpo, beta: 0.3}}}"
    config = load("configs/quickstart.yaml", [spo])
    policy = build_policy(toy_base, config.model, 0, with_phi=True)
    theta, phi = ({n: dict(policy.named_parameters())[n] for n in names} for names in parameter_groups(policy))

    def own(name):
        return name.removeprefix("base_model.model.")

    lora = policy.peft_config[PHI]
    peft = LoraConfig(r=lora.r, lora_alpha=lora.lora_alpha, target_modules="all-linear")
    options = {"per_device_train_batch_size": 4, "learning_rate": 1e-3, "lr_scheduler_type": "constant"}
    trainer, watch = trainer_of(model, tmp_path, peft_config=peft, **options)
    start = {own(name): p for name, p in (theta | phi).items()}
    with torch.no_grad():
        for name, p in trainer.model.named_parameters():
            p.copy_(start[name])
    rank = Distributed(0, 1, torch.device("cpu"))
    measure, table = Measure(policy, trainer.chat, config.train, rank), Rows(trainer.train_dataset)
    method, dynamics = Method(config.methods["spo"]), DynamicsCallback([], None, None, table)
    grads, metrics = preference_gradients(measure, theta, phi, table, method, dynamics, 1, range(4))
    trainer.train()
    assert {own(name) for name in grads} == watch.grads[0].keys()
    for name, grad in grads.items():
        torch.testing.assert_close(watch.grads[0][own(name)], grad, rtol=1e-4, atol=1e-6)
    assert trainer.state.log_history[0] | metrics == pytest.approx(trainer.state.log_history[0], rel=1e-4)
    for name, p in (theta | phi).items():
        p.grad = grads[name]
    torch.optim.AdamW([*theta.values(), *phi.values()], lr=1e-3, weight_decay=0.0).step()
    after = dict(trainer.model.named_parameters())
    for name, p in (theta | phi).items():
        torch.testing.assert_close(after[own(name)], p, rtol=1e-4, atol=2e-5)


def test_the_defaults_are_the_pipelines(toy_base):
    here, there = SPOConfig(), Spo(type="spo")
    for name in ("lambda_sft", "gamma", "sft_reduction"):
        assert getattr(here, name) == getattr(there, name)
    assert (here.inner_steps, here.eta) == (there.inner.steps, there.inner.eta)
    assert (here.base, here.beta) == (there.base.type, there.base.beta)


def test_gradients_are_the_mean_of_the_micro_batches(model, tmp_path):
    """Here those of an epoch's last step, which has fewer batches than the accumulation asks for."""
    trainer, watch = trainer_of(copy.deepcopy(model), tmp_path / "a", gradient_accumulation_steps=4)
    single, apart = trainer_of(model, tmp_path / "b", learning_rate=0.0, max_steps=2)
    trainer.train()
    single.train()
    for name, grad in watch.grads[0].items():
        torch.testing.assert_close(grad, (apart.grads[0][name] + apart.grads[1][name]) / 2)
    log, one, other = trainer.state.log_history[0], *single.state.log_history[:2]
    assert log["loss"] == pytest.approx(
        math.log(2), abs=1e-3
    )  # policy and reference are the same before the first step
    for key in ("logps/chosen", "spo/R", "spo/term_b_norm"):
        assert log[key] == pytest.approx((one[key] + other[key]) / 2, rel=1e-4)


def test_the_saved_model_is_the_trained_one_and_a_checkpoint_resumes(model, toy_base, tmp_path):
    rates = {"max_steps": 2, "learning_rate": 1e-3, "adapter_learning_rate": 1e-2}
    trainer, _ = trainer_of(copy.deepcopy(model), tmp_path / "a", save_strategy="steps", save_steps=1, **rates)
    trainer.train()
    assert [group["initial_lr"] for group in trainer.optimizer.param_groups] == [1e-3, 1e-2, 1e-3]
    trainer.save_model(tmp_path / "merged")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    batch = collate_pairs(trainer.train_dataset, trainer.chat.pad_id)
    for side, (logps, _) in zip(SIDES, trainer._logps(batch), strict=True):
        own = [batch[f"{side}_{key}"] for key in ("input_ids", "labels", "attention_mask")]
        torch.testing.assert_close(completion_logps(saved.eval(), *own)[0], logps, rtol=0, atol=1e-3)
        assert (logps - batch[f"ref_{side}_logps"]).abs().min() > 0.01  # the reference is the start
    again, _ = trainer_of(model, tmp_path / "a", **rates)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    for name, p in trainer.model.named_parameters():
        torch.testing.assert_close(dict(again.model.named_parameters())[name], p)


def test_held_out_pairs_are_measured(model, tmp_path):
    trainer, _ = trainer_of(model, tmp_path, ROWS[:2], eval_dataset=ROWS[2:], eval_strategy="steps", eval_steps=1)
    trainer.train()
    held_out = next(log for log in trainer.state.log_history if "eval_loss" in log)
    batch = collate_pairs(trainer.eval_dataset, trainer.chat.pad_id)
    chosen, rejected = (logps.double() for logps, _ in trainer._logps(batch))
    margins = SETTINGS["beta"] * (chosen - batch["ref_chosen_logps"] - rejected + batch["ref_rejected_logps"])
    assert held_out["eval_loss"] == pytest.approx(-torch.nn.functional.logsigmoid(margins).mean().item(), rel=1e-5)
    assert held_out["eval_logps/chosen"] == pytest.approx(chosen.mean().item(), rel=1e-5)
    change = (chosen - batch["ref_chosen_logps"]).mean().item()
    assert held_out["eval_logps/chosen_change"] == pytest.approx(change, rel=1e-4)


def test_pefts_own_model_and_trls_formats_are_taken_and_useless_rows_left_out(model, tmp_path, caplog):
    turns = {side: [{"role": "assistant", "content": ROWS[0][side]}] for side in SIDES}
    asked = [{"role": "user", "content": ROWS[0]["prompt"]}]
    conversations = {side: asked + answer for side, answer in turns.items()}
    rows = [ROWS[0], {"prompt": asked, **turns}, conversations, ROWS[0] | {"chosen": "a" * 9000}, {"prompt": "alone"}]
    peft = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    trainer, _ = trainer_of(peft, tmp_path, rows)
    assert len(trainer.train_dataset) == 3
    assert trainer.train_dataset[0] == trainer.train_dataset[1] == trainer.train_dataset[2]
    assert "1 of the pairs left out: longer than max_length=1024 tokens" in caplog.text
    assert merged(trainer.model).keys() == AutoModelForCausalLM.from_config(model.config).state_dict().keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fp16": True}, "in bf16 or float32"),
        ({"peft_config": IA3Config(target_modules=["q_proj"], feedforward_modules=[])}, "needs LoRA adapters"),
        ({"rows": [{"prompt": "How?"}]}, "no pair can be used: no column"),
    ],
)
def test_what_it_can_not_train_is_refused(model, tmp_path, options, message):
    with pytest.raises((ValueError, UserError), match=message):
        trainer_of(model, tmp_path, **options)


def test_trls_own_configuration_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match=r"args must be an SPOConfig, not a DPOConfig: docs/trl\.md"):
        SPOTrainer(model, DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False), train_dataset=ROWS)
