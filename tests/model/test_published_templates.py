"""The chat templates of published models, as TRL (Apache 2.0) ships them unchanged beside its own versions.

The text is read from the installed package; the tokenizer is the toy's with each template's special tokens. GLM-4-9B's
is in no package: a short one with the same marks stands for it.
"""

import datetime
import json
import re
from pathlib import Path

import pytest
import trl
from transformers import AutoTokenizer

from spo_ray.config.model import TemplateConfig
from spo_ray.errors import RowRejectedError, UserError
from spo_ray.model.tokenizer import ChatTokenizer

FOLDER = Path(trl.__file__).parent / "chat_templates"
DAY = datetime.date(2026, 7, 9)
ASK, AGAIN = {"role": "user", "content": "How many?"}, {"role": "user", "content": "And now?"}
SAID = {"role": "assistant", "content": "Four."}
SYSTEM = {"role": "system", "content": "Be brief."}
ADD = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]}

OWN = {
    "glm4_9b": "[gMASK]<sop>{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
}
AGREE = ["qwen2_5", "qwen3_instruct_2507", "llama3_2", "gemma", "gemma3", "phi3", "cohere"]
"""Templates that write before answers what prompts end in; Gemma 1 and 2 have the same one."""
SETTINGS = {
    "qwen3": {"template_arguments": {"enable_thinking": False}},
    "gptoss": {"answer_prefix": "<|channel|>final<|message|>"},
    "glm4moe": {"answer_prefix": "\n<think></think>\n"},
    "deepseek_r1_distill": {"answer_prefix": "</think>\n\n"},
    "glm4_9b": {"answer_prefix": "\n"},
}
"""What the others need for answers without reasoning."""
ADVICE = {
    "qwen3": "the chat template writes '<think>\\n\\n</think>\\n\\n' between a prompt and its answer: set "
    "model.template_arguments to {enable_thinking: false}, or model.answer_prefix to '' if your answers bring it along",
    "gptoss": "the chat template writes '<|channel|>final<|message|>' between a prompt and its answer: set "
    "model.answer_prefix to '<|channel|>final<|message|>', or model.answer_prefix to '' if your answers bring it along",
    "glm4moe": "the chat template writes '\\n<think></think>\\n' between a prompt and its answer: set "
    "model.answer_prefix to '\\n<think></think>\\n', or model.answer_prefix to '' if your answers bring it along",
    "glm4_9b": "the chat template writes '\\n' between a prompt and its answer: set model.answer_prefix to '\\n', or "
    "model.answer_prefix to '' if your answers bring it along",
    "deepseek_r1_distill": "the chat template ends prompts in '<think>\\n' and leaves that out: set "
    "model.answer_prefix to the text that ends it, or model.answer_prefix to '' if your answers bring it along",
}
ENDS = {
    "qwen2_5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "qwen3_instruct_2507": "<|im_end|>",
    "llama3_2": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "gemma3": "<end_of_turn>",
    "phi3": "<|end|>",
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "gptoss": "<|return|>",
    "glm4moe": "<eos>",
    "glm4_9b": "<eos>",
    "deepseek_r1_distill": "<｜end▁of▁sentence｜>",
}


@pytest.fixture
def published(toy_base):
    def load(name, **settings):
        tokenizer = AutoTokenizer.from_pretrained(toy_base)
        text = OWN.get(name) or (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
        marks = sorted(set(re.findall(r"<[|｜][^<>|｜\s]+[|｜]>|<(?:start|end)_of_turn>", text)))
        tokenizer.add_special_tokens({"additional_special_tokens": marks, "bos_token": "<bos>", "eos_token": "<eos>"})
        tokenizer.chat_template = text
        return ChatTokenizer(tokenizer, TemplateConfig(template_date=DAY, **settings))

    return load


@pytest.mark.parametrize("name", ENDS)
def test_answers_stand_where_the_template_puts_them(published, name):
    """The whole conversation, written by the template alone, begins with the tokens of prompt and answer."""
    chat = published(name, **SETTINGS.get(name, {}))
    chat.check_opening()
    prompt = [ASK, SAID, AGAIN]
    whole = chat.tokenizer.apply_chat_template(
        [*prompt, {"role": "assistant", "content": "Five, I think."}], tokenize=False, **chat.arguments
    )
    ids = chat.prompt_ids(prompt) + chat.answer_ids(prompt, "Five, I think.")
    text = chat.tokenizer.decode(ids).replace("<think>\n</think>\n\n", "")  # DeepSeek's leaves it out afterwards
    assert text.removesuffix(ENDS[name]) + ENDS[name] == text
    assert whole.removesuffix("\n").removesuffix("<eos>").startswith(text.removesuffix("<eos>"))
    assert not chat.is_changed_by_template(prompt, "Five, I think.")


@pytest.mark.parametrize("name", ENDS)
def test_what_to_set(published, name):
    chat = published(name)
    assert chat.advice() == ADVICE.get(name, "")
    if name in AGREE:
        chat.check_opening()
        return
    with pytest.raises(UserError, match=re.escape(ADVICE[name])):
        chat.check_opening()
    assert not published(name, answer_prefix="").advice()  # the answers bring it along
    assert not chat.is_changed_by_template("How many?", "Four.")  # the answer itself stays as it is


@pytest.mark.parametrize(
    ("name", "stops"),
    [("glm4_9b", {"<eos>", "<|user|>"}), ("glm4moe", {"<eos>", "<|user|>"}), ("qwen3", {"<eos>", "<|im_end|>"})],
)
def test_where_no_token_ends_an_answer_the_next_turn_does(published, name, stops):
    chat = published(name)
    assert {chat.tokenizer.decode([token]) for token in chat.stop_ids} == stops


@pytest.mark.parametrize(
    ("name", "answer", "changed"),
    [
        ("qwen2_5", "Four. ", False),
        ("llama3_2", "Four. ", True),
        ("gemma", "\nFour.", True),
        ("qwen3", "<think>\nHm.\n</think>\n\nFour.", False),
        ("deepseek_r1_distill", "Hm.\n</think>\n\nFour.", True),
    ],
)
def test_answers_that_a_template_changes(published, name, answer, changed):
    settings = {"answer_prefix": ""} if name == "deepseek_r1_distill" else SETTINGS.get(name, {})
    if "<think>" in answer:  # reasoning comes with the answer, behind a prompt without any
        settings = {"answer_prefix": ""}
    chat = published(name, **settings)
    assert chat.is_changed_by_template("How many?", answer) == changed


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("llama3_2", {}, "Today Date: 09 Jul 2026\n"),
        ("llama3_2", {"template_arguments": {"date_string": "26 Jul 2024"}}, "Today Date: 26 Jul 2024\n"),
        ("gptoss", {"template_arguments": {"reasoning_effort": "low"}}, "Current date: 2026-07-09\n\nReasoning: low"),
        ("qwen3", {"template_arguments": {"enable_thinking": False}}, "<think>\n\n</think>\n\n"),
    ],
)
def test_arguments_and_the_date(published, name, settings, expected):
    assert expected in published(name, **settings).prompt_text([ASK])


@pytest.mark.parametrize("argument", ["enable_thinkng", "messages"])
def test_an_argument_that_is_none_is_refused(published, argument):
    with pytest.raises(UserError, match=f"'{argument}' is no setting of .*chat template"):
        published("qwen3", template_arguments={argument: False})


@pytest.mark.parametrize(
    ("name", "prompt", "extra", "reason"),
    [
        ("gemma", [SYSTEM, ASK], None, "refuses the messages: System role not supported"),
        ("gemma", [ASK, AGAIN], None, "refuses the messages: Conversation roles must alternate"),
        ("gemma3", [ASK, SAID], None, "refuses the messages: Conversation roles must alternate"),
        ("cohere", [ASK, SAID], None, "refuses the messages: Conversation roles must alternate"),
        ("gemma", [{**ASK, "extra": json.dumps({"tools": [ADD]})}], None, "leaves out the tool 'add'"),
        ("phi3", [ASK], json.dumps({"tool_calls": CALL["tool_calls"]}), "leaves out the tool 'add'"),
        ("llama3_2", [ASK], json.dumps({"reasoning_content": "Hm."}), "leaves out the 'reasoning_content'"),
        ("deepseek_r1_distill", [ASK], json.dumps({"tool_calls": CALL["tool_calls"]}), "the chat template"),
    ],
)
def test_conversations_that_a_template_can_not_write(published, name, prompt, extra, reason):
    chat = published(name, **SETTINGS.get(name, {}))
    with pytest.raises(RowRejectedError, match=reason):
        chat.prompt_ids(prompt)
        chat.answer_ids(prompt, "Four.", extra)
        chat.is_changed_by_template(prompt, "Four.")


@pytest.mark.parametrize(
    ("name", "text", "extra", "expected"),
    [
        ("qwen2_5", "", {"tool_calls": CALL["tool_calls"]},
         '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>'),
        ("llama3_2", "", {"tool_calls": CALL["tool_calls"]},
         '{"name": "add", "parameters": {"a": 2}}<|eot_id|>'),
        ("qwen3", "Four.", {"reasoning_content": "Hm."}, "<think>\nHm.\n</think>\n\nFour.<|im_end|>"),
        ("gptoss", "Four.", {"thinking": "Hm."},
         "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Four.<|return|>"),
    ],
)  # fmt: skip
def test_answers_with_calls_and_reasoning(published, name, text, extra, expected):
    chat = published(name)
    prompt = [{**ASK, "extra": json.dumps({"tools": [ADD]})}]
    assert '"name": "add"' in chat.tokenizer.decode(chat.prompt_ids(prompt)) or name == "gptoss"
    assert chat.tokenizer.decode(chat.answer_ids(prompt, text, json.dumps(extra))) == expected
