"""A tiny float64 model with adapters, and an oracle for the SPO gradient by double backward."""

from contextlib import contextmanager

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Qwen2Config, Qwen2ForCausalLM

from spo_ray.core.gradients import KeepFloat64
from spo_ray.core.losses import PairLogps, bind, sft_loss

VOCABULARY = 50


def tiny_model(seed=0, dtype=torch.float64):
    """Two layers, LoRA with dropout (which must be off during a step), nothing at its initial value."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)
    model = get_peft_model(Qwen2ForCausalLM(config), lora).to(dtype)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    names = [name for name, _ in model.named_parameters()]
    return model, [n for n in names if ".lora_" not in n], [n for n in names if ".lora_" in n]


def tiny_batch(pairs=3, seed=1):
    """Prompts and completions of several lengths, right-padded."""
    rng = torch.Generator().manual_seed(seed)
    batch = {}
    for side, width in (("chosen", 10), ("rejected", 12)):
        ids = torch.randint(0, VOCABULARY, (pairs, width), generator=rng)
        labels, mask = ids.clone(), torch.ones_like(ids)
        for i in range(pairs):
            labels[i, : 3 + i] = -100
            if i:
                labels[i, -i:], mask[i, -i:] = -100, 0
        batch |= {f"{side}_input_ids": ids, f"{side}_labels": labels, f"{side}_attention_mask": mask}
        batch[f"ref_{side}_logps"] = -torch.rand(pairs, generator=rng, dtype=torch.float64) * 4 - 30
    batch["score_gaps"] = torch.arange(1, pairs + 1, dtype=torch.float64) / 2
    return batch


def swapped(batch):
    """Exchange chosen and rejected of all pairs."""
    other = {"chosen": "rejected", "rejected": "chosen"}
    return {next((k.replace(side, other[side]) for side in other if side in k), k): v for k, v in batch.items()}


def objective_gradient(model, batch, backbone, adapters, **o):
    """Gradient of F by exact differentiation: double backward for R, real inner steps for the lower level."""
    named = dict(model.named_parameters())
    params, n = [named[k] for k in (*backbone, *adapters)], len(backbone)
    scope = {"all": params, "backbone": params[:n], "adapters": params[n:]}[o["norm_scope"]]

    def logps(side):
        ids, labels = batch[f"{side}_input_ids"], batch[f"{side}_labels"][:, 1:]
        logits = model(input_ids=ids, attention_mask=batch[f"{side}_attention_mask"]).logits[:, :-1]
        every = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        return (every * (labels != -100)).sum(1), (labels != -100).sum(1)

    def norm(value):
        grads = torch.autograd.grad(value, scope, create_graph=True)
        return torch.sqrt(sum((g * g).sum() for g in grads))

    model.eval()
    with sdpa_kernel(SDPBackend.MATH), KeepFloat64():
        (u_w, n_w), (u_l, n_l) = logps("chosen"), logps("rejected")
        mean = n_w.double().mean().item()
        base = bind(o["base"], beta=o["beta"], margin=o["margin"])
        others = (batch["ref_chosen_logps"], batch["ref_rejected_logps"], n_w, n_l, mean)
        loss = base(PairLogps(u_w, u_l, *others, score_gaps=batch["score_gaps"]))[0]
        v_w, v_l = (u_w / n_w, u_l / n_l) if o.get("norm_of") == "mean" else (u_w, u_l)
        if o["hinge"] == "batch":
            hinge = torch.relu(norm(v_w.mean()) - norm(v_l.mean()))
        else:
            hinge = sum(torch.relu(norm(a) - norm(b)) for a, b in zip(v_w, v_l, strict=True)) / len(u_w)
        total = loss + o["gamma"] * hinge + o["lambda_sft"] * sft_loss(u_w, mean, o["sft_reduction"])
        grads = list(torch.autograd.grad(total, params))
        saved = [p.detach().clone() for p in params]
        for _ in range(o["inner_steps"]):
            step = torch.autograd.grad(sft_loss(logps("chosen")[0], mean, o["sft_reduction"]), params[:n])
            with torch.no_grad():
                for p, g in zip(params[:n], step, strict=True):
                    p.sub_(o["eta"] * g)
        hat = torch.autograd.grad(sft_loss(logps("chosen")[0], mean, o["sft_reduction"]), params[n:])
        with torch.no_grad():
            for p, value in zip(params, saved, strict=True):
                p.copy_(value)
    for i, g in enumerate(hat):
        grads[n + i] = grads[n + i] - o["lambda_sft"] * g
    model.train()
    return grads, hinge.item()


def relative_error(found, truth):
    """Euclidean distance of two gradients over the norm of the second."""
    difference = sum(((a - b) ** 2).sum() for a, b in zip(found, truth, strict=True))
    return (difference / sum((b * b).sum() for b in truth)).sqrt().item()


@contextmanager
def tensor_float_32():
    """Allow a GPU to round the factors of float32 products, in the context; a CPU does not."""
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
