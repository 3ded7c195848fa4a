import json

import pytest

from spo_ray.config.load import load
from spo_ray.data.grade import grade_samples
from spo_ray.data.sources import load_data
from spo_ray.data.verifiers import load_verifier, verifier_identity
from spo_ray.errors import UserError
from spo_ray.runtime.run import Run

from .test_grade import sampled

OWN = "examples.verifier:MultipleChoice"


@pytest.mark.parametrize(
    ("response", "grade"),
    [
        ("4 and 6 are even. Answer: B", ("B", True, True)),
        ("The answer is (b), not C.", ("B", True, True)),
        ("It must be B", ("B", True, False)),
        ("Answer: C", ("C", False, False)),
        ("no idea", (None, False, False)),
    ],
)
def test_the_example(in_root, response, grade):
    verifier = load_verifier(OWN)
    assert verifier.accepts(" B ")
    assert not verifier.accepts("5")
    assert verifier.grade(response, " B ") == grade


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gsm9k", "known are gsm8k"),
        ("no_such_module:X", "No module named"),
        ("examples.verifier:Missing", "no attribute 'Missing'"),
        ("fractions:Fraction", r"has no method accepts\(\)"),
    ],
)
def test_verifiers_that_are_none(in_root, name, message):
    with pytest.raises(UserError, match=message):
        load_verifier(name)


def test_grades_depend_on_the_code_of_a_verifier(tmp_path, monkeypatch):
    assert verifier_identity("gsm8k") == "gsm8k"
    code = "class V:\n    def accepts(self, a): return True\n    def grade(self, r, a): return {}\n"
    monkeypatch.syspath_prepend(tmp_path)
    for name, text in {"one": code.format(1), "two": code.format(2), "three": code.format(1)}.items():
        (tmp_path / f"own_{name}.py").write_text(text)
    digests = [verifier_identity(f"own_{name}:V").split("@")[1] for name in ("one", "two", "three")]
    assert digests[0] == digests[2] != digests[1]


def test_a_task_of_ones_own(local_ray, in_root, tmp_path):
    rows = [{"q": f"Which? (A) {i} (B) {i + 1}", "a": "AB"[i % 2]} for i in range(4)] + [{"q": "Which?", "a": "5"}]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns = "question_column: q, answer_column: a, prompt: 'Choose. {question}'"
    data = f"data={{type: questions, path: {tmp_path}, verifier: '{OWN}', {columns}}}"
    arguments = [f"output={tmp_path}", data, "data.skip_missing_gold=true"]
    run = Run(load("configs/quickstart.yaml", arguments))
    questions = load_data(run, "train")
    assert [row["prompt"] for row in questions.rows()] == [f"Choose. {row['q']}" for row in rows[:4]]
    assert questions.manifest["rows"]["dropped"] == {"no gold answer": 1}
    answers = sampled(tmp_path, questions.rows(), ["Answer: A", "B"])
    graded = grade_samples(run, "scores", answers).rows()
    assert [row["correct"] for row in graded] == [[True, False], [False, True]] * 2
    assert [row["strict"] for row in graded] == [[True, False], [False, False]] * 2
