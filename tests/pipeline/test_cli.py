"""Commands on files: grading, and looking at tokens."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import trl
from ruamel.yaml import YAML

from spo_ray.config.data import PreferenceData
from spo_ray.config.load import load
from spo_ray.data.sources import load_data
from spo_ray.pipeline import cli
from spo_ray.runtime.console import CONTROL
from spo_ray.runtime.run import Run

ROWS = [
    {"question": "q", "answer": "So 18.\n#### 18", "response": "The answer is $18.00.", "more": [1]},
    {"question": "q", "answer": 5, "response": "#### 5"},
    {"question": "q", "answer": "1,234", "response": "#### 5"},
]
BROKEN = [
    '{"question": "q"',
    "[1]",
    '{"question": "q", "answer": "1"}',
    '{"question": "q", "answer": "x", "response": "1"}',
]
BROKEN += ['{"question": "q", "answer": NaN, "response": "1"}', '{"question": "q", "answer": "1", "response": 1}']


def call(*arguments):
    return int(cli.app(arguments, exit_on_error=False, result_action="return_value") or 0)


def test_score_gsm8k(tmp_path, capsys):
    file = tmp_path / "answers.jsonl"
    text = "\n".join([*map(json.dumps, ROWS), "", *BROKEN])
    latin = '{"question": "é", "answer": "1", "response": "1"}'
    file.write_bytes(text.encode("utf-8-sig") + b"\n" + latin.encode("cp1252"))
    assert call("score", "gsm8k", str(file)) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {
        "n": 3,
        "accuracy": pytest.approx(2 / 3),
        "strict_accuracy": pytest.approx(1 / 3),
    }
    scored = [json.loads(line) for line in (tmp_path / "answers.scored.jsonl").read_text().splitlines()]
    assert [(row["correct"], row["extracted"], row["strict_correct"]) for row in scored] == [
        (True, "18", False),
        (True, "5", True),
        (False, "5", False),
    ]
    assert all(row.items() <= graded.items() for row, graded in zip(ROWS, scored, strict=True))
    reasons = [
        "not JSON",
        "not a JSON object",
        "no column 'response'",
        "no gold answer",
        "'answer' is neither",
        "no text",
        "not UTF-8",
    ]
    lines = printed.err.splitlines()
    assert len(lines) == len(reasons)
    for number, (line, reason) in enumerate(zip(lines, reasons, strict=True), 5):
        assert f"line {number}: " in line
        assert reason in line


@pytest.mark.parametrize(("text", "message"), [(None, "can't be read"), ("", "it is empty"), ("{", "line 1: not JSON")])
def test_score_without_a_usable_row(tmp_path, capsys, text, message):
    file = tmp_path / "answers.jsonl"
    if text is not None:
        file.write_text(text)
    assert call("score", "gsm8k", str(file)) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ([] if text is None else [file.name])


def test_a_folder_in_the_place_of_an_answer_is_left_alone(tmp_path, capsys):
    file = tmp_path / "answers.jsonl"
    file.write_text(json.dumps({"question": "q", "answer": "5", "response": "5"}))
    (tmp_path / "answers.scored.jsonl").mkdir()
    assert call("score", "gsm8k", str(file)) == 2
    assert "answers.scored.jsonl is no file: name another one" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "answers.scored.jsonl"]


def test_inspect_shows_tokens_masks_lengths_and_drops(in_root, chat, tmp_path, capsys):
    rows = [{"prompt": "How many?", "chosen": "5 pens", "rejected": f"{n} pens"} for n in (6, 6, 7, 8)]
    rows += [
        {"prompt": "How many?", "chosen": "5" * 300, "rejected": "6"},
        {"prompt": "p", "chosen": "", "rejected": "6"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--data", str(tmp_path / "rows.jsonl"), "--rows", "2", "train.max_length=100"]
    assert call("inspect", *arguments) == 0
    text = capsys.readouterr().out
    assert text.count("How many?<|end|><|assistant|>") == 2
    assert text.count("5 pens<|end|>") == 2
    prompt, chosen = len(chat.prompt_ids("How many?")), len(chat.completion_ids("5 pens"))
    assert text.count(f"chosen: {chosen} tokens, mask 0 x {prompt}, 1 x {chosen}") == 2
    assert "dropped: 1 (longer than max_length=100 tokens)" in text
    assert "dropped: 1 ('chosen' is empty)" in text
    assert "dropped: 1 (duplicate)" in text  # as in training
    assert "1 of 6 rows dropped for exceeding max_length (100). Rows are never truncated." in text
    assert "6 rows" in text


def test_inspect_says_what_to_set(in_root, tmp_path, capsys):
    """Rows with a column of another name, and Qwen 3's template as TRL ships it."""
    row = {"system": "", "question": "Name a red fruit.", "chosen": "A cherry is.", "rejected": "A banana is.", "n": 1}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    tree = {**YAML(typ="safe").load(Path("configs/preferences.yaml")), "name": "inspected"}
    tree["model"] |= {"chat_template": template, "path": str(Path("assets/toy_base").absolute())}
    (tmp_path / "own.yaml").write_text(json.dumps(tree))
    options = ["--config", str(tmp_path / "own.yaml"), "--data", str(tmp_path / "rows.jsonl")]
    assert call("inspect", *options) == 2
    assert "dropped: 1 (no column 'prompt': set data.columns.prompt to one of 'question')" in capsys.readouterr().out
    options.append("data.columns.prompt=question")
    assert call("inspect", *options) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "set model.template_arguments to {enable_thinking: false}, or model.answer_prefix" in text
    assert "columns that are not used: n" in text
    assert call("plan", *options[:2], f"data.path={tmp_path / 'rows.jsonl'}") == 2
    assert "set model.template_arguments to {enable_thinking: false}" in capsys.readouterr().err
    assert call("inspect", *options, "model.template_arguments.enable_thinking=false") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "set model" not in text
    assert re.search(r"In 0 of \d+ rows the chat template changes the answer's tokens\.", text)


def test_inspect_spells_out_control_characters_and_styles_nothing_that_rows_hold(in_root, tmp_path, capsys):
    evil = "\x1b]0;owned\x07 [red]5 pens[/red] \u202e"
    rows = [{"prompt": prompt, "chosen": evil, "rejected": "6"} for prompt in (evil, "refuse [/x]\x1b")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    refuse = "{% if 'refuse' in messages[0].content %}{{ raise_exception(messages[0].content) }}{% endif %}"
    template = json.dumps(refuse + (in_root / "assets" / "toy_base" / "chat_template.jinja").read_text())
    arguments = ["--data", str(tmp_path / "rows.jsonl"), f"model.chat_template={template}"]
    assert call("inspect", *arguments) == 0
    text = capsys.readouterr().out
    assert text.replace("\n", "").count("\\x1b]0;owned\\x07 [red]5 pens[/red] ") == 2
    assert "dropped: 1 (the chat template refuses the messages: refuse [/x]\\x1b)" in text
    assert not CONTROL.search(text)


def test_inspect_shows_the_rejected_response_that_training_would_see(in_root, tmp_path, capsys):
    completions = [{"response": f"answer {score}", "overall_score": score} for score in range(9)]
    rows = [{"instruction": f"How many {i}?", "completions": completions} for i in range(5)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = "data={type: preference, path: elsewhere, rejected: random, test_pairs: 2}"
    arguments = ["--data", str(tmp_path / "rows.jsonl"), "--rows", "5", config]
    assert call("inspect", *arguments) == 0
    shown = re.findall(r"answer (\d)<", capsys.readouterr().out)[1::2]
    data = PreferenceData(path=tmp_path / "rows.jsonl", rejected="random", test_pairs=2)
    run = Run(load("configs/quickstart.yaml", [f"output={tmp_path}"]).model_copy(update={"data": data}))
    pairs = sorted((row for split in ("train", "test") for row in load_data(run, split).rows()), key=lambda r: r["id"])
    assert shown == [row["rejected"].removeprefix("answer ") for row in pairs]
    assert set(shown) != {"0"}


def test_inspect_keeps_the_configured_subset_and_revision(in_root, monkeypatch, capsys):
    """A stand-in for the hub, which tests can't reach."""
    asked = []

    def load_dataset(*arguments, **named):
        asked.append((arguments, named))
        return iter([{"prompt": "p", "chosen": "5", "rejected": "6"}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    own = "data={type: preference, path: elsewhere/data, subset: main, revision: abc, train_split: train_prefs}"
    assert call("inspect", "--data", "organisation/data", own) == 0
    assert asked == [(("organisation/data", "main"), {"split": "train_prefs", "revision": "abc"})]


def test_inspect_without_usable_data(in_root, tmp_path, capsys):
    assert call("inspect") == 2
    assert "--data" in capsys.readouterr().err
    (tmp_path / "rows.jsonl").write_text('{"prompt": "p"}')
    assert call("inspect", "--data", str(tmp_path)) == 2
    (tmp_path / "train.jsonl").write_text('{"prompt": "p"}')
    assert call("inspect", "--data", str(tmp_path)) == 2
    printed = capsys.readouterr()
    assert "no column 'chosen'" in printed.out
    assert "no row can be used" in printed.err


def test_every_command_has_help_and_completion(capsys):
    names = [name for name in cli.app if not name.startswith("-")]
    assert {"run", "plan", "init", "doctor", "evaluate", "sweep", "score", "inspect", "report", "import-gguf"} <= set(
        names
    )
    for name in names:
        assert call(name, "--help") == 0
        shown = capsys.readouterr().out
        assert len(shown.splitlines()) > 5
        assert re.findall(r"spo-ray ([\w-]+)", shown.partition("Example:")[2]) == [name]  # its own example
    script = cli.app.generate_completion(prog_name="spo-ray", shell="bash")
    assert all(name in script for name in names)


def test_score_alpaca_eval_prints_json_and_names_what_is_left_out(tmp_path, capsys):
    sides = {"instruction": "i", "output_1": "one", "output_2": "two", "generator_1": "base", "generator_2": "new"}
    file = tmp_path / "annotations.json"
    file.write_text(json.dumps([sides | {"preference": value} for value in (2.0, 1.5, None)]))
    assert call("score", "alpaca-eval", str(file), "--lc", "minimal") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {
        "win_rate": 75.0,
        "standard_error": 25.0,
        "discrete_win_rate": 75.0,
        "length_controlled_win_rate": None,
        "lc_method": "length_controlled_minimal",
        "n_total": 2,
    }
    assert "1 records without a preference are left out" in printed.err
    assert call("score", "alpaca-eval", str(file)) == 0  # tests run without the hub
    assert "the length-controlled win rate uses the minimal formula" in capsys.readouterr().err
    assert call("score", "alpaca-eval", str(tmp_path / "absent.json")) == 2


def test_python_without_docstrings_is_refused(in_root):
    done = subprocess.run([sys.executable, "-OO", "-m", "spo_ray", "--help"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: Ray can't be imported without docstrings: unset PYTHONOPTIMIZE, or leave -OO out\n"
