import json

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, PeftConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

from spo_ray.config.model import ModelConfig
from spo_ray.core.logps import completion_logps
from spo_ray.model.collate import collate
from spo_ray.model.export import Probe, export, read_probe
from spo_ray.model.load import build_policy, load_model

ADAPTER = {"type": "adapter", "rank": 4, "alpha": 8}


@pytest.fixture
def row(chat):
    return chat.prompt_ids("2 and 3?"), chat.completion_ids("2 + 3 = 5.\n#### 5")


def trained(path, scale=0.05, **options):
    """A policy away from its start, in what is trained of it."""
    fields = {"theta": options.pop("theta")} if "theta" in options else {}
    model = build_policy(path, ModelConfig(path=str(path), **fields), 3, **({"with_phi": True} | options))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * scale)
    return model


@torch.no_grad()
def logp(model, row, chat):
    return completion_logps(model.eval(), **collate([row], chat.pad_id))[0].item()


def probe(model, row, chat):
    return Probe(*row, logp(model, row, chat))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_merged_export_is_the_trained_model(toy_base, chat, row, tmp_path, dtype):
    model = trained(toy_base, dtype=dtype)
    before = probe(model, row, chat)
    export(model, chat, tmp_path, before)
    after = logp(AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=True), row, chat)
    assert abs(after - before.logp) < 1e-4
    assert abs(after - logp(load_model(toy_base), row, chat)) > 1e-2
    assert read_probe(tmp_path) == {"prompt_ids": row[0], "completion_ids": row[1], "logp": before.logp}
    assert read_probe(toy_base) is None
    assert {value.dtype for value in load_file(tmp_path / "model.safetensors").values()} == {torch.float32}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    assert {file.name for file in tmp_path.iterdir()} == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "spo_probe.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


@pytest.mark.parametrize("theta", [{"type": "all"}, {"type": "last_layers", "count": 1}, ADAPTER])
def test_backbone_and_adapter_load_together(toy_base, chat, row, tmp_path, theta, monkeypatch):
    model = trained(toy_base, theta=theta)
    before = probe(model, row, chat)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    export(model, chat, tmp_path, before, backbone_and_adapter=True)
    merged = logp(load_model(tmp_path), row, chat)
    monkeypatch.chdir(tmp_path / "adapter")  # the adapter names its backbone relative to itself
    assert abs(logp(AutoPeftModelForCausalLM.from_pretrained("."), row, chat) - before.logp) < 1e-4
    assert abs(merged - before.logp) < 1e-4
    assert abs(logp(load_model(tmp_path / "backbone"), row, chat) - before.logp) > 1e-2
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    phi = {name.replace(".default", ""): value for name, value in state.items() if ".default." in name}
    assert saved.keys() == phi.keys()
    assert all(torch.equal(saved[name], phi[name]) for name in phi)
    settings = PeftConfig.from_pretrained(".")
    assert (settings.base_model_name_or_path, settings.r, settings.lora_alpha) == ("../backbone", 8, 16)


def test_sft_exports_its_adapter_theta_merged(toy_base, chat, row, tmp_path):
    model = trained(toy_base, with_phi=False, theta=ADAPTER, scale=0.1)
    before = probe(model, row, chat)
    with pytest.raises(ValueError, match="no adapter phi"):
        export(model, chat, tmp_path, before, backbone_and_adapter=True)
    export(model, chat, tmp_path, before)
    after = build_policy(tmp_path, ModelConfig(path="x", theta=ADAPTER), 0, with_phi=True)
    assert abs(logp(after, row, chat) - before.logp) < 1e-4
    assert abs(logp(load_model(toy_base), row, chat) - before.logp) > 1e-2


def test_cards_name_the_base_model_through_all_stages(toy_base, chat, row, tmp_path):
    sft, spo = tmp_path / "sft", tmp_path / "spo"
    model = trained(toy_base, with_phi=False)
    export(model, chat, sft, probe(model, row, chat))
    model = trained(sft)
    export(model, chat, spo, probe(model, row, chat), method="spo", backbone_and_adapter=True)
    folders = {sft: "transformers", spo: "transformers", spo / "backbone": "transformers", spo / "adapter": "peft"}
    for folder, library in folders.items():
        data = ModelCard.load(folder / "README.md").data
        assert (data.base_model, data.library_name) == ("toy_base", library)
        assert data.tags == ["spo_ray", "sft" if folder == sft else "spo"]
    texts = [file for file in tmp_path.rglob("*") if file.suffix in (".md", ".json", ".jinja")]
    assert len(texts) == 22
    for file in texts:  # an export goes to other machines
        assert str(tmp_path) not in file.read_text()
        assert str(toy_base) not in file.read_text()
    model = build_policy(toy_base, ModelConfig(path="x"), 0, with_phi=True)
    model.get_base_model().name_or_path = "org/some-model"
    export(model, chat, tmp_path / "hub", Probe(*row, 0.0))
    assert ModelCard.load(tmp_path / "hub" / "README.md").data.base_model == "org/some-model"


def test_a_card_has_the_licence_of_the_base_model_and_what_it_is_told(toy_base, chat, row, tmp_path):
    for name, license in (("licensed", "license: apache-2.0"), ("silent", "tags: [a]"), ("broken", "license: [")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(f"---\n{license}\n---\n")
        model = build_policy(toy_base, ModelConfig(path="x"), 0, with_phi=True)
        model.get_base_model().name_or_path = str(tmp_path / name)
        export(model, chat, tmp_path / "out" / name, Probe(*row, 0.0), about="## Data\n\n48 pairs.")
    cards = {name: ModelCard.load(tmp_path / "out" / name / "README.md") for name in ("licensed", "silent", "broken")}
    assert [card.data.license for card in cards.values()] == ["apache-2.0", None, None]
    assert "## Data\n\n48 pairs.\n\n## Licence\n\n`apache-2.0`, the licence of licensed." in cards["licensed"].text
    assert "## Licence\n\nThat of silent, which its card names." in cards["silent"].text


def test_generation_ends_where_answers_do(toy_base, chat, row, tmp_path):
    """A base model's settings know the end of text alone."""
    for before, after in ((7, [7, chat.end_id]), ([7, 8], [7, 8, chat.end_id]), (None, [chat.end_id])):
        model = build_policy(toy_base, ModelConfig(path="x"), 0, with_phi=False)
        model.generation_config.eos_token_id = before
        export(model, chat, tmp_path, Probe(*row, 0.0))
        assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == after
