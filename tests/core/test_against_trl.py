import math
import random
from functools import partial

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from spo_ray.core.logps import IGNORE, completion_logps
from spo_ray.core.losses import PairLogps, cpo, dpo_nll, exo_pair, ipo, orpo
from spo_ray.core.spo import spo_gradients
from spo_ray.model.collate import collate_pairs

from .tiny import relative_error

trl = pytest.importorskip("trl")

VOCABULARY = 200
BETA = 0.3
LOSSES = {
    "dpo": ({"loss_type": ["sigmoid"]}, "dpo"),
    "ipo": ({"loss_type": ["ipo"]}, partial(ipo, beta=BETA, ipo_reduction="mean")),
    "robust": ({"loss_type": ["robust"], "label_smoothing": 0.1}, "robust_dpo"),
    "hinge": ({"loss_type": ["hinge"]}, "slic"),
    "apo_zero": ({"loss_type": ["apo_zero"]}, "apo_zero"),
    "apo_down": ({"loss_type": ["apo_down"]}, "apo_down"),
    "nca_pair": ({"loss_type": ["nca_pair"]}, "nca"),
    "exo_pair": (
        {"loss_type": ["exo_pair"], "label_smoothing": 0.1},
        partial(exo_pair, beta=BETA, label_smoothing=0.1),
    ),
    "dpo + sft": (
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]},
        partial(dpo_nll, beta=BETA, mu=1.0, sft_reduction="token_mean"),
    ),
}
METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)


def make_model():
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        pad_token_id=0,
        eos_token_id=1,
    )
    return disturbed(Qwen2ForCausalLM(config), 0.1)


def disturbed(model, size):
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * size)
    return model


def make_reference():
    return disturbed(make_model(), 0.05)


def make_tokenizer():
    words = ["<pad>", "<eos>", *(f"w{i}" for i in range(VOCABULARY - 2))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def make_rows(pairs=6):
    rng = random.Random(0)

    def text(shortest, longest):
        return " ".join(f"w{rng.randrange(VOCABULARY - 2)}" for _ in range(rng.randint(shortest, longest)))

    return [{"prompt": text(2, 9), "chosen": " " + text(1, 20), "rejected": " " + text(1, 20)} for _ in range(pairs)]


def make_trainer(folder, model=None, reference=None, rows=None, tokenizer=None, **options):
    import datasets

    config = trl.DPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=6,
        beta=BETA,
        bf16=False,
        gradient_checkpointing=False,
        precompute_ref_log_probs=False,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        **options,
    )
    return trl.DPOTrainer(
        model=model or make_model(),
        ref_model=reference or make_reference(),
        args=config,
        train_dataset=datasets.Dataset.from_list(rows or make_rows()),
        processing_class=tokenizer or make_tokenizer(),
    )


def converted(batch, reference):
    """TRL's batch, chosen rows and then rejected rows, as ours."""
    labels, ours = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORE), {}
    columns = {"input_ids": batch["input_ids"], "labels": labels, "attention_mask": batch["attention_mask"]}
    for i, side in enumerate(("chosen", "rejected")):
        inputs = {key: column.chunk(2)[i] for key, column in columns.items()}
        with torch.no_grad():
            ours[f"ref_{side}_logps"] = completion_logps(reference, **inputs)[0]
        ours |= {f"{side}_{key}": column for key, column in inputs.items()}
    return ours


def ours(batch, base, model=None, **options):
    model = model or make_model()
    names = [name for name, _ in model.named_parameters()]
    fixed = {"adapters": [], "lambda_sft": 0.0, "gamma": 0.0, "inner_steps": 0, "eta": 0.0}
    return spo_gradients(model, batch, backbone=names, base=base, **fixed | options)


@pytest.fixture(scope="module", params=LOSSES)
def trl_step(request, tmp_path_factory):
    return step_of_trl(tmp_path_factory.mktemp("trl"), request.param, reference=make_reference())


def step_of_trl(folder, loss, reference, **policy):
    """One loss and its gradients by TRL, and what is needed to have the same here."""
    options, base = LOSSES[loss]
    trainer = make_trainer(folder, reference=reference, **policy, **options)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    grads = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
    metrics = {key: values[0] for key, values in trainer._metrics["train"].items()}
    return {"base": base, "batch": converted(batch, reference), "loss": loss.item(), "grads": grads, "metrics": metrics}


@pytest.mark.parametrize("options", [{}, {"share_prompt": False}, {"pairs_per_backward": 1}], ids=str)
def test_loss_and_gradients_are_trls(trl_step, options):
    grads, metrics = ours(trl_step["batch"], trl_step["base"], beta=BETA, **options)
    assert list(grads) == list(trl_step["grads"])
    error = relative_error(grads.values(), list(trl_step["grads"].values()))
    print(f"loss {abs(metrics['loss'] / trl_step['loss'] - 1):.1e}, gradients {error:.1e}")
    assert metrics["loss"] == pytest.approx(trl_step["loss"], rel=1e-5)
    assert error < 1e-5


def test_metrics_are_trls(trl_step):
    _, metrics = ours(trl_step["batch"], trl_step["base"], beta=BETA)
    found = {key: metrics[key] for key in METRICS}
    assert found == pytest.approx({key: trl_step["metrics"][key] for key in METRICS}, rel=1e-4)
    assert 0 < found["rewards/accuracies"] < 1


@pytest.mark.parametrize("options", [{}, {"share_prompt": False}, {"pairs_per_backward": 1}], ids=str)
def test_simpo_is_its_published_formula(options):
    tokenizer, beta, gamma = make_tokenizer(), 2.0, 0.5
    rows = [{f"{key}_ids": tokenizer(text)["input_ids"] for key, text in row.items()} for row in make_rows()]
    model, losses = make_model(), []
    for row in rows:
        means = []
        for side in ("chosen", "rejected"):
            ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
            logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            of_tokens = logps[torch.arange(len(logps)), ids[0, 1:]][len(row["prompt_ids"]) - 1 :]
            assert len(of_tokens) == len(row[f"{side}_ids"])
            means.append(of_tokens.mean())
        losses.append(-torch.log(torch.sigmoid(beta * means[0] - beta * means[1] - gamma)))
    loss = torch.stack(losses).mean()
    truth = torch.autograd.grad(loss, list(model.parameters()))
    no_reference = {"ref_chosen_logps": math.nan, "ref_rejected_logps": math.nan}
    batch = collate_pairs([row | no_reference for row in rows], 0)
    grads, metrics = ours(batch, "simpo", beta=beta, margin=gamma, **options)
    error = relative_error(grads.values(), truth)
    print(f"loss {abs(metrics['loss'] / loss.item() - 1):.1e}, gradients {error:.1e}")
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert error < 1e-5


def test_cpo_and_orpo_are_trls():
    """Their preference terms; TRL's trainers take L_SFT over the prompt too."""
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    lengths = torch.tensor([3, 4]), torch.tensor([2, 5])
    sums = torch.tensor([-3.0, -8.0]), torch.tensor([-4.0, -5.0])
    pairs = PairLogps(*sums, *sums, *lengths, 3.5)
    device = type("Accelerator", (), {"device": "cpu"})
    settings = {"beta": BETA, "alpha": 0.0, "loss_type": "sigmoid", "label_smoothing": 0.0, "accelerator": device}
    trainer = type("Settings", (), settings)
    theirs = CPOTrainer.cpo_loss(trainer, *sums)[0].mean()
    assert cpo(pairs, beta=BETA, mu=0.0)[0].item() == pytest.approx(theirs.item(), rel=1e-6)
    means = [column / n for column, n in zip(sums, lengths, strict=True)]
    theirs, *rewards = ORPOTrainer.odds_ratio_loss(trainer, *means)[:3]
    loss, metrics = orpo(pairs, beta=BETA, mu=0.0)
    assert loss.item() == pytest.approx(-theirs.mean().item(), rel=1e-6)
    assert metrics["rewards/chosen"] == pytest.approx(rewards[0].mean().item())
