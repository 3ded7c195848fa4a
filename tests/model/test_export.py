import torch
from transformers import AutoModelForCausalLM

from spo_ray.config import ModelConfig
from spo_ray.core.logps import completion_logps
from spo_ray.model.checkpoint import export_merged, read_probe
from spo_ray.model.collate import collate
from spo_ray.model.load import add_adapters, load_model, parameter_groups


def test_merged_export_is_the_trained_model(toy_base, chat, tmp_path):
    model = add_adapters(load_model(toy_base), ModelConfig(path=str(toy_base)), seed=3)
    backbone, adapters = parameter_groups(model)
    assert len(backbone) + len(adapters) == len(list(model.named_parameters()))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in set(adapters):
                parameter.add_(torch.randn_like(parameter) * 0.05)
    probe = (chat.prompt_ids("2 and 3?"), chat.completion_ids("2 + 3 = 5.\n#### 5"))
    batch = collate([probe], chat.pad_id)
    model.eval()
    before = completion_logps(model, **batch)[0].item()
    export_merged(model, chat, tmp_path, probe)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, use_safetensors=True).eval()
    after = completion_logps(loaded, **batch)[0].item()
    untrained = completion_logps(load_model(toy_base).eval(), **batch)[0].item()
    assert abs(after - before) < 1e-4
    assert abs(after - untrained) > 1e-2
    assert abs(read_probe(tmp_path)["logp"] - before) < 1e-6
    assert not list(tmp_path.glob("*.bin"))


def test_adapters_depend_on_the_seed_alone(toy_base):
    def weights(seed):
        model = add_adapters(load_model(toy_base), ModelConfig(path=str(toy_base)), seed)
        return torch.cat([p.detach().flatten() for n, p in model.named_parameters() if ".lora_" in n])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
