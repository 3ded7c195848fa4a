import importlib.util
import json
import shutil

import pytest
import torch

from spo_ray.config.data import EngineConfig, SamplingConfig
from spo_ray.core.logps import completion_logps
from spo_ray.data.sample import SamplingJob, _answering
from spo_ray.errors import UserError
from spo_ray.model.collate import collate
from spo_ray.model.completion import choose_engine
from spo_ray.model.engines import open_engine
from spo_ray.model.export import PROBE, Probe, export
from spo_ray.model.load import load_model
from spo_ray.runtime.artifact import Artifact
from spo_ray.runtime.map_rows import Pool

CONFIG = EngineConfig(max_model_len=256)
QUESTIONS = ["Each of 5 boxes holds 7 pens. How many pens do the boxes hold?", "Ada owns 3 toys and finds 4 more."]
ENGINES = [
    pytest.param(
        "vllm", marks=pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
    ),
    "transformers",
]


@pytest.fixture(scope="module")
def checkpoints(toy_base, chat, tmp_path_factory):
    """Two different models with probes, as training exports them."""
    text = (chat.prompt_ids(QUESTIONS[0]), chat.completion_ids("5 * 7 = 35.\n#### 35"))
    paths = []
    for i in range(2):
        model = load_model(toy_base)
        torch.manual_seed(i)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02 * i)
        paths.append(tmp_path_factory.mktemp(f"model{i}"))
        with torch.inference_mode():
            logp = completion_logps(model.eval(), **collate([text], chat.pad_id))[0].item()
        export(model, chat, paths[-1], Probe(*text, logp))
    return paths


def trainer_logps(path, chat, prompts, texts):
    model = load_model(path).eval()
    batch = collate([(p, chat.completion_ids(t)) for p, t in zip(prompts, texts, strict=True)], chat.pad_id)
    with torch.inference_mode():
        return completion_logps(model, **batch)


@pytest.mark.parametrize("kind", ENGINES)
def test_one_process_serves_several_checkpoints_with_the_trainers_log_probabilities(kind, checkpoints, chat):
    prompts = [chat.prompt_ids(q) for q in QUESTIONS]
    seen = []
    for path in (*checkpoints, checkpoints[0]):
        engine = open_engine(kind, str(path), CONFIG, chat)  # raises where the probe disagrees
        greedy = engine.generate(prompts, n=1, temperature=0.0, max_tokens=64, seeds=[0, 0])
        answers = [c[0] for c in greedy if c[0].finished]
        assert answers
        keep = [p for p, c in zip(prompts, greedy, strict=True) if c[0].finished]
        logps, tokens = trainer_logps(path, chat, keep, [a.text for a in answers])
        for answer, logp, count in zip(answers, logps.tolist(), tokens.tolist(), strict=True):
            assert answer.tokens == count
            assert abs(answer.logp - logp) / count < 1e-3
        given = chat.completion_ids("5 + 7 = 12.\n#### 12")
        expected, _ = trainer_logps(path, chat, prompts[:1], ["5 + 7 = 12.\n#### 12"])
        best = (prompts[0], greedy[0][0].ids)
        found, sure = engine.score([(prompts[0], given), best])
        assert abs(found.logp - expected.item()) / len(given) < 1e-3
        assert sure.logp == pytest.approx(greedy[0][0].logp, abs=1e-3)
        assert (found.greedy, sure.greedy) == (False, True)
        seen.append([c[0].logp for c in greedy])
        engine.close()
    assert seen[0] == pytest.approx(seen[2], abs=1e-4)
    assert seen[0] != pytest.approx(seen[1], abs=1e-2)


@pytest.mark.parametrize("kind", ENGINES)
def test_samples_repeat_with_their_seeds(kind, checkpoints, chat):
    prompts = [chat.prompt_ids(q) for q in QUESTIONS]
    engine = open_engine(kind, str(checkpoints[1]), CONFIG, chat)

    def texts(seeds):
        found = engine.generate(prompts, n=4, temperature=1.0, max_tokens=32, seeds=seeds)
        assert [len(c) for c in found] == [4, 4]
        return [[c.text for c in question] for question in found]

    first = texts([5, 6])
    assert first == texts([5, 6])
    assert first != texts([7, 8])
    assert len({text for question in first for text in question}) > 2
    engine.close()


@pytest.mark.parametrize("kind", ENGINES)
def test_a_checkpoints_own_generation_settings_count_for_nothing(kind, checkpoints, chat, tmp_path):
    """Instruction-tuned models ship a nucleus and a repetition penalty."""
    biased = tmp_path / "biased"
    shutil.copytree(checkpoints[1], biased)
    file = biased / "generation_config.json"
    own = {"do_sample": True, "repetition_penalty": 9.0, "top_p": 0.5, "top_k": 2}  # the toy model is sure of itself
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    prompts, seen = [chat.prompt_ids(q) for q in QUESTIONS], []
    for path in (checkpoints[1], biased):
        engine = open_engine(kind, str(path), CONFIG, chat)
        for temperature in (0.0, 2.0):
            found = engine.generate(prompts, n=1, temperature=temperature, max_tokens=48, seeds=[5, 6])
            seen.append([completion.ids for (completion,) in found])
        engine.close()
    assert seen[:2] == seen[2:]


@pytest.mark.parametrize("kind", ENGINES)
def test_a_long_prompt_leaves_the_others_their_room_and_full_texts_can_be_scored(kind, checkpoints, chat):
    engine = open_engine(kind, str(checkpoints[1]), CONFIG, chat)
    prompts = [chat.prompt_ids(QUESTIONS[0]), chat.prompt_ids("pens " * 400)[:250]]
    found = engine.generate(prompts, n=1, temperature=0.0, max_tokens=64, seeds=[0, 0])
    (alone,) = engine.generate(prompts[:1], n=1, temperature=0.0, max_tokens=64, seeds=[0])
    assert found[0][0].ids == alone[0].ids
    assert found[0][0].tokens > 8
    assert 1 <= found[1][0].tokens <= 5
    scored = engine.score([(ids, answers[0].ids) for ids, answers in zip(prompts, found, strict=True)])
    assert [s.logp for s in scored] == pytest.approx([answers[0].logp for answers in found], abs=1e-2)
    engine.close()


@pytest.mark.parametrize("kind", ENGINES)
def test_stale_weights_are_refused(kind, checkpoints, chat, tmp_path):
    """The probe of one checkpoint beside the weights of another, as after a reload that did nothing."""
    path = tmp_path / "stale"
    shutil.copytree(checkpoints[1], path)
    shutil.copy(checkpoints[0] / PROBE, path / PROBE)
    with pytest.raises(RuntimeError, match="another log-probability than the trainer"):
        open_engine(kind, str(path), CONFIG, chat)
    assert json.loads((path / PROBE).read_text())["completion_ids"]


def test_the_choice_of_an_engine_is_explained(monkeypatch):
    assert choose_engine(EngineConfig(type="transformers")) == ("transformers", "as configured")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    kind, why = choose_engine(EngineConfig())
    assert kind == "transformers"
    assert "not installed" in why
    with pytest.raises(UserError, match=r"engine\.type=vllm, but vLLM is not installed"):
        choose_engine(EngineConfig(type="vllm"))


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_arguments_reach_vllm(checkpoints, chat):
    config = EngineConfig(max_model_len=256, arguments={"max_num_seqs": 3, "enable_prefix_caching": False})
    engine = open_engine("vllm", str(checkpoints[0]), config, chat)
    settings = engine.llm.llm_engine.vllm_config
    assert settings.scheduler_config.max_num_seqs == 3
    assert not settings.cache_config.enable_prefix_caching
    engine.close()


def test_more_engines_than_the_first_are_an_option():
    config = EngineConfig(replicas=2, max_replicas=3, cpus=0.5, gpus=0.0)
    source = SamplingJob(Artifact("m", "m"), config, SamplingConfig())
    assert _answering(source, "seed")[1] == Pool(2, 0.5, 0.0, most=3, timeout_s=7200.0)
    with pytest.raises(ValueError, match="max_replicas=1 is below replicas=2"):
        EngineConfig(replicas=2, max_replicas=1)
