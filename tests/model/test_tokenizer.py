import copy

import pytest
from transformers import AutoTokenizer

from spo_ray.config.model import TemplateConfig
from spo_ray.errors import UserError
from spo_ray.model.tokenizer import ChatTokenizer

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_prompt_ends_where_the_completion_begins(chat):
    prompt, completion = chat.prompt_ids("How many?"), chat.completion_ids("5 + 5 = 10.\n#### 10")
    assert chat.tokenizer.decode(prompt) == "<|user|>How many?<|end|><|assistant|>"
    assert chat.tokenizer.decode(completion) == "5 + 5 = 10.\n#### 10<|end|>"
    assert chat.decode(completion) == "5 + 5 = 10.\n#### 10"


def test_exactly_one_end_token(chat):
    assert chat.completion_ids("yes").count(chat.end_id) == 1
    assert chat.completion_ids("yes<|end|>") == chat.completion_ids("yes")
    assert chat.completion_ids("  \n") == []


def test_the_end_of_turn_is_found_before_a_trailing_newline(toy_base):
    tokenizer = AutoTokenizer.from_pretrained(toy_base)
    tokenizer.chat_template = CHATML
    assert ChatTokenizer(tokenizer).end_id == tokenizer.convert_tokens_to_ids("<|end|>")


@pytest.mark.parametrize("text", ["naïve café", "数学 😀", "a\tb\r\n\x00", "{'json': [1.5e-3]}"])
def test_any_text_round_trips(chat, text):
    assert chat.decode(chat.completion_ids(text)) == text


def test_digits_stay_single(chat):
    assert len(chat.completion_ids("1234")) == 5


def test_a_missing_template_is_refused_and_can_be_given(toy_base):
    tokenizer = AutoTokenizer.from_pretrained(toy_base)
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(UserError, match=r"no chat template.*model\.chat_template"):
        ChatTokenizer(bare)
    assert ChatTokenizer.load(toy_base, TemplateConfig(chat_template=CHATML)).tokenizer.chat_template == CHATML


def test_a_tokenizer_that_is_larger_than_the_embedding(toy_base):
    """transformers adds ``<|endoftext|>`` itself, as id 439 beside an embedding of 439 rows."""
    tokenizer = AutoTokenizer.from_pretrained(toy_base)
    chat = ChatTokenizer(tokenizer, rows=439)
    assert (chat.has_markup("a <|endoftext|>"), chat.has_markup("a b")) == (True, False)
    tokenizer.add_special_tokens({"pad_token": "<|padding|>"})
    assert (ChatTokenizer(tokenizer, rows=439).pad_id, ChatTokenizer(tokenizer, rows=441).pad_id) == (chat.end_id, 440)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tokenizer.chat_template = CHATML.replace("<|end|>", "<|turn|>")
    with pytest.raises(
        UserError, match=r"ids up to 441, but the model's embedding has 439 rows: '<\|turn\|>' is 441; "
    ):
        ChatTokenizer(tokenizer, rows=439)
    tokenizer.add_tokens("zebra")
    tokenizer.chat_template = CHATML
    with pytest.raises(
        UserError, match=r"ids up to 442, but the model's embedding has 439 rows: 'zebra' is 442; resize"
    ):
        ChatTokenizer(tokenizer, rows=439)
