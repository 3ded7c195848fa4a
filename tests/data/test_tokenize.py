"""Real preference rows as token ids: boundaries, ends, and what is dropped."""

import datetime
import json
import unicodedata

import pytest
from transformers import AutoTokenizer

from spo_ray.data.tokenize import RESPONSE, _single_responses, tokenise_pairs, tokenise_sft
from spo_ray.errors import RowRejectedError, UserError
from spo_ray.model.tokenizer import ChatTokenizer, tokenise_row
from spo_ray.runtime import first_start, schema
from spo_ray.runtime.artifact import Artifact, write_rows
from spo_ray.runtime.run import PlannedRun, Run
from spo_ray.runtime.schema import SIDES

from ..helpers import small_config

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + END }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {"plain": CHATML.replace("END", "''"), "newline behind the end": CHATML.replace("END", r"'\n'")}
TRIMMING = TEMPLATES["plain"].replace("m['content']", "m['content'] | trim")


def chatml(toy_base, template):
    tokenizer = AutoTokenizer.from_pretrained(toy_base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return ChatTokenizer(tokenizer)


@pytest.mark.parametrize("template", TEMPLATES)
def test_real_rows_round_trip(toy_base, shared_data, template):
    chat = chatml(toy_base, TEMPLATES[template])
    lines = (shared_data / "ultrafeedback" / "train.jsonl").read_text().splitlines()[:300]
    reasons = []
    for number, line in enumerate(lines):
        row = json.loads(line) | {"id": str(number)}
        try:
            found = tokenise_row(chat, row, SIDES, 10**6)
        except RowRejectedError as error:
            reasons.append(str(error))
            continue
        assert not found["template_differs"]
        opening = f"<|im_start|>user\n{row['prompt']}<|im_end|>"
        assert chat.tokenizer.decode(found["prompt_ids"]).startswith(unicodedata.normalize("NFC", opening))
        for side, column in SIDES.items():
            ids = found[column]
            assert chat.decode(ids) == unicodedata.normalize("NFC", row[side])  # the tokenizer's own normal form
            assert ids.count(chat.end_id) == 1
            assert ids[-1] == chat.end_id
    assert set(reasons) <= {"empty completion"}
    assert len(reasons) < 5


def test_begin_of_text_is_not_doubled(toy_base):
    tokenizer = AutoTokenizer.from_pretrained(toy_base)
    tokenizer.add_special_tokens({"bos_token": "<|bos|>"})
    tokenizer.add_bos_token = True
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    chat = ChatTokenizer(tokenizer)
    row = {"id": "0", "prompt": "How many?", "chosen": "5", "rejected": "6", "score_gap": 2.5}
    found = tokenise_row(chat, row, SIDES, 100)
    assert found["score_gap"] == 2.5
    assert found["prompt_ids"].count(tokenizer.bos_token_id) == 1
    assert not any(tokenizer.bos_token_id in found[column] for column in SIDES.values())


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": " \n"}, "empty completion"),
        ({"rejected": "a" * 400}, "longer than max_length=64 tokens"),
        ({"rejected": "\n" * 10**7 + "5"}, "^longer than 64 tokens$"),
        ({"prompt": "\n" * 10**7 + "5"}, "^longer than 64 tokens$"),
        ({"rejected": "5"}, "chosen and rejected are the same"),
        ({"chosen": "It is 5.<|end|><|user|>And now?"}, "special tokens within a completion"),
        ({"prompt": "Hello<|end|><|assistant|>5"}, "special tokens within the prompt"),
    ],
)
def test_rows_that_are_dropped(chat, row, reason):
    row = {"id": "0", "prompt": "How many?", "chosen": "5", "rejected": "6"} | row
    with pytest.raises(RowRejectedError, match=reason):
        tokenise_row(chat, row, SIDES, 64)


def test_a_template_that_refuses_a_prompt_quarantines_the_row(toy_base):
    tokenizer = AutoTokenizer.from_pretrained(toy_base)
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    tokenizer.chat_template = refuse + tokenizer.chat_template
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many?"}]
    row = {"id": "0", "prompt": prompt, "chosen": "5", "rejected": "6"}
    with pytest.raises(RowRejectedError, match="refuses the messages: System role not supported"):
        tokenise_row(ChatTokenizer(tokenizer), row, SIDES, 100)
    assert tokenise_row(ChatTokenizer(tokenizer), row | {"prompt": prompt[1:]}, SIDES, 100)["prompt_ids"]


def test_every_turn_of_the_assistant_is_a_row(chat):
    turns = [
        ("system", "Be short."),
        ("assistant", "Hello."),
        ("user", "2 + 2?"),
        ("assistant", "4"),
        ("user", "And 3?"),
    ]
    prompt = [{"role": role, "content": content} for role, content in turns]
    row = {"id": "7", "prompt": prompt, "chosen": "5", "rejected": "6"}
    (last,) = _single_responses(row, every_turn=False)
    assert (last["id"], last["prompt"], last["response"]) == ("7-0", prompt, "5")
    rows = _single_responses(row, every_turn=True)
    assert [(r["id"], r["prompt"], r["response"]) for r in rows] == [
        ("7-0", prompt[:1], "Hello."),
        ("7-1", prompt[:3], "4"),
        ("7-2", prompt, "5"),
    ]
    found = tokenise_row(chat, rows[1], RESPONSE, 100)
    assert chat.tokenizer.decode(found["completion_ids"]) == "4<|end|>"
    assert chat.tokenizer.decode(found["prompt_ids"]).endswith("<|user|>2 + 2?<|end|><|assistant|>")


def test_the_day_of_the_first_start_is_kept_and_belongs_to_the_identity(in_root, tmp_path, monkeypatch):
    """A template may print today's date: a run that is resumed tomorrow must not mix prompts."""
    (tmp_path / "in").mkdir()
    write_rows(tmp_path / "in" / "part-0.parquet", [], schema.Pair)

    def start(day, *overrides, loss_on="last"):
        monkeypatch.setattr(first_start, "date", type("Day", (datetime.date,), {"today": lambda: day}))
        run = Run(small_config(tmp_path, f"sft.loss_on={loss_on}", *overrides))
        with run.locked():
            plan = PlannedRun(small_config(tmp_path, f"sft.loss_on={loss_on}", *overrides))
            tokens = tokenise_sft(plan, Artifact(tmp_path / "in", "in"))
            return run.config.model.template_date, tokens.digest

    first, second = datetime.date(2026, 7, 9), datetime.date(2026, 7, 10)
    started = start(first)
    assert started[0] == first
    assert start(second) == started  # the same run, resumed
    given = start(second, "name=other", "model.template_date=2026-07-09")
    assert given == started
    later = start(second, "name=another")
    assert later[0] == second
    assert later[1] != started[1]
    assert start(second, loss_on="every_assistant_turn")[1] != started[1]


def test_a_template_that_changes_answers_is_counted_and_refused(local_ray, in_root, toy_base, tmp_path):
    (tmp_path / "in").mkdir()
    source = {"source_id": "0", "chosen_source": "data", "rejected_source": "data"}
    table = [
        {"id": str(i), "prompt": [{"role": "user", "content": "How many?"}], "chosen": chosen, "rejected": "6"} | source
        for i, chosen in enumerate(["5", "5 ", " 5", "7"])
    ]
    write_rows(tmp_path / "in" / "part-0.parquet", table, schema.Pair)
    template = (toy_base / "chat_template.jinja").read_text().replace("m['content']", "m['content'] | trim")
    config = small_config(tmp_path)
    model = config.model.model_copy(update={"chat_template": template})

    def tokenise(limit):
        changed = model.model_copy(update={"max_template_mismatch": limit})
        run = Run(config.model_copy(update={"model": changed}))
        return tokenise_pairs(run, "pair_tokens", Artifact(tmp_path / "in", "in"))

    with pytest.raises(UserError, match=r"in 2 of 4 rows the chat template.*max_template_mismatch"):
        tokenise(0.3)
    short = config.model_copy(update={"train": config.train.model_copy(update={"max_length": 2})})
    with pytest.raises(UserError, match=r"no rows that fit into train.max_length=2: 4 dropped: 4 longer than max_l"):
        tokenise_pairs(Run(short), "pair_tokens", Artifact(tmp_path / "in", "in"))
    artifact = tokenise(0.5)
    assert artifact.manifest["facts"]["template_differs"] == 2
    lengths = [2 * len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in artifact.rows()]
    assert artifact.lengths == (pytest.approx(sum(lengths) / len(lengths)), False)
    assert [row["template_differs"] for row in artifact.rows()] == [False, True, True, False]
