"""Tasks of lm-evaluation-harness on this project's engines, against the harness's own Hugging Face model."""

import json
from itertools import islice

import pytest

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from spo_ray.config.data import EngineConfig
from spo_ray.config.evaluate import EvalConfig, LmEvalConfig
from spo_ray.config.model import OWN_TEMPLATE
from spo_ray.data.toy import problems, render
from spo_ray.errors import UserError
from spo_ray.evaluate.lm_eval import RESULTS, _metrics, known_task
from spo_ray.evaluate.lm_eval_model import EngineLM, run_task
from spo_ray.model.engines import LocalAnswers
from spo_ray.runtime.artifact import Artifact

CHOICE = """
task: toy_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
WRITTEN = """
task: toy_written
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["####"], max_gen_toks: 48, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Two small tasks of our own; the harness's need the hub."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = []
    for problem in islice(problems("test", 0), 24):
        wrong = render(problem.mistakes[0] if problem.mistakes else problem.steps, None if problem.mistakes else (0, 1))
        answer = problem.solution.partition("####")[0]
        rows.append({"question": problem.question, "choices": [wrong, problem.solution], "label": 1, "answer": answer})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "choice.yaml").write_text(CHOICE.format(file=folder / "rows.jsonl"))
    (folder / "written.yaml").write_text(WRITTEN.format(file=folder / "rows.jsonl"))
    return folder


@pytest.fixture(scope="module")
def local(toy_base):
    return LocalAnswers(
        "transformers", str(toy_base), EngineConfig(type="transformers", max_model_len=256), OWN_TEMPLATE
    )


@pytest.mark.parametrize("task", ["toy_choice", "toy_written"])
def test_results_are_the_harnesss_own(task, tasks, local, toy_base, tmp_path):
    found = run_task(local, task, LmEvalConfig(include_path=tasks, limit=24), seed=0)
    model = HFLM(pretrained=str(toy_base), device="cpu", dtype="float32", batch_size=4)
    manager = TaskManager(include_path=str(tasks))
    expected = simple_evaluate(model=model, tasks=[task], limit=24, task_manager=manager, apply_chat_template=True)
    assert found["n"] == {task: 24}
    metrics = expected["results"][task]
    assert {k: v for k, v in found["results"][task].items() if k != "alias"} == {
        k: pytest.approx(v) if isinstance(v, float) else v for k, v in metrics.items() if k != "alias"
    }
    (tmp_path / RESULTS).write_text(json.dumps(found))
    (first, *_) = _metrics(EvalConfig(), Artifact(tmp_path, ""), [])
    metric = "acc" if task == "toy_choice" else "exact_match"
    assert (first.metric, first.value, first.n) == (f"{task}/{metric}", metrics[f"{metric},none"], 24)
    assert 0 < first.value < 1
    assert first.low < first.value < first.high


def test_rolling_likelihoods_of_long_texts(local, toy_base):
    text = " ".join(f"{i} + 1 = {i + 1}." for i in range(60))
    request = Instance("loglikelihood_rolling", {}, (text,), 0)
    model = EngineLM(local)
    assert len(model.tok_encode(text)) > local.config.max_model_len
    expected = HFLM(pretrained=str(toy_base), device="cpu", dtype="float32", max_length=254)
    expected.custom_prefix_token_id = model.prefix_token_id
    (value,) = expected.loglikelihood_rolling([request])
    assert model.loglikelihood_rolling([request]) == [pytest.approx(value, rel=1e-4)]


def test_a_long_prompt_does_not_shorten_the_answers_to_others(local):
    question = "Each of 5 boxes holds 7 pens. How many pens do the boxes hold?"
    model, settings = EngineLM(local), {"until": [], "max_gen_toks": 40}
    ask = [
        model.apply_chat_template([{"role": "user", "content": text}]) for text in (question, "pens " * 400 + question)
    ]
    alone = model.generate_until([Instance("generate_until", {}, (ask[0], settings), 0)])
    both = model.generate_until([Instance("generate_until", {}, (text, settings), 0) for text in ask])
    assert both[0] == alone[0]
    assert len(both[0]) > 10


def test_an_unknown_task_is_named():
    with pytest.raises(UserError, match="no task 'absent'"):
        known_task("absent", LmEvalConfig())
