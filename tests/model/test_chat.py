"""`spo-ray chat` with the toy model, against transformers' own generation from the chat template."""

import json
import shutil

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from spo_ray.config.load import load
from spo_ray.config.model import ModelConfig
from spo_ray.model.chat import Speaker
from spo_ray.pipeline import cli

QUESTIONS = ["Ada owns 3 pens and finds 4 more. How many pens does Ada own now?", "And if 2 get lost?"]


def own_answer(path, messages):
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    found = model.generate(**ids, max_new_tokens=32, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(found[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_answers_are_streamed_and_follow_the_conversation(toy_base):
    speaker, messages = Speaker(str(toy_base), ModelConfig(path=str(toy_base)), "float32"), []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        pieces = []
        speaker.answer(question, {"max_new_tokens": 32, "do_sample": False}, pieces.append)
        messages.append({"role": "assistant", "content": own_answer(toy_base, messages)})
        assert "".join(pieces) == messages[-1]["content"]
        assert len(pieces) > 1
    assert speaker.messages == messages


@pytest.fixture
def run(in_root, toy_base, tmp_path):
    """A run's folder with the toy model as SFT's checkpoint, and as dpo's in the second of two rounds."""
    config = load("configs/quickstart.yaml", ["rounds=2", f"model.path={toy_base}"])
    for name in ("sft", "method_dpo_round2"):
        shutil.copytree(toy_base, tmp_path / name)
    (tmp_path / "config.json").write_text(json.dumps(config.model_dump(mode="json")))
    return tmp_path


def chat(*words):
    return cli.app(["chat", *map(str, words)], exit_on_error=False, result_action="return_value")


def test_checkpoints_answer_side_by_side(run, toy_base, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    options = ["--temperature", "0", "--max-tokens", "32"]
    assert chat(run, "base", "dpo", "-m", QUESTIONS[0], "-m", "/new", "-m", QUESTIONS[0], *options) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    words = own_answer(toy_base, [{"role": "user", "content": QUESTIONS[0]}]).splitlines()
    expected = [["base", "dpo"], *(line.split() * 2 for line in words)]
    assert lines == expected * 2  # the second time in a new conversation


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "error: name one or several checkpoints: base, sft, dpo"),
        (["spo"], "has no checkpoint spo: it has base, sft, dpo"),
    ],
)
def test_what_is_not_there_is_said(run, capsys, names, message):
    assert chat(run, *names) == 2
    assert message in capsys.readouterr().err
