"""Suites over real checkpoints, by real evaluation actors."""

import json
import shutil
import threading
import time
from collections import Counter

import psutil
import pytest
import ray
import torch
from ray.exceptions import RayTaskError

from spo_ray.config.model import TemplateConfig
from spo_ray.core.logps import completion_logps
from spo_ray.data.sources import load_data
from spo_ray.errors import EvaluatorLostError, UserError
from spo_ray.evaluate import accuracy, health
from spo_ray.evaluate.accuracy import accuracies
from spo_ray.evaluate.actors import Evaluator, EvaluatorHandle, require_alive
from spo_ray.evaluate.evaluations import Evaluations
from spo_ray.evaluate.health import _text
from spo_ray.evaluate.statistics import wilson
from spo_ray.evaluate.suite import SuiteContext
from spo_ray.model.adapter import ModelSource, adapted, is_adapter
from spo_ray.model.collate import collate
from spo_ray.model.load import load_model
from spo_ray.runtime import schema
from spo_ray.runtime.artifact import Artifact, external, write_rows
from spo_ray.runtime.run import Run

from ..helpers import small_config

NAMES = ["base", "sft", "dpo", "spo"]
OPTIONS = [
    "engine.replicas=2",
    "engine.cpus=0.5",
    "eval.seeds=[0, 1]",
    "eval.health_prompts=6",
    "eval.max_tokens=48",
]


@pytest.fixture(scope="module")
def checkpoints(toy_base, chat, tmp_path_factory):
    """Four models, one of them a PEFT adapter beside its backbone."""
    from peft import LoraConfig, get_peft_model

    found = {"base": external(toy_base)}
    for i, name in enumerate(NAMES[1:], 1):
        model = load_model(toy_base)
        torch.manual_seed(i)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.01 * i)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder / "backbone")
        chat.tokenizer.save_pretrained(folder / "backbone")
        if name == "spo":
            adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
            adapted.peft_config["default"].base_model_name_or_path = "../backbone"
            adapted.save_pretrained(folder / "adapter")
        found[name] = external(folder / ("adapter" if name == "spo" else "backbone"))
    return found


def evaluators():
    """Processes of evaluation actors of this process's cluster."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if "ray::Evaluator" in " ".join(process.info["cmdline"] or []):
            found.append(process)
    return found


@pytest.fixture(scope="module")
def evaluated(local_ray, checkpoints, tmp_path_factory, request):
    """Four checkpoints on two actors, one of which is killed while it answers."""
    monkeypatch = pytest.MonkeyPatch()
    request.addfinalizer(monkeypatch.undo)
    monkeypatch.chdir(request.config.rootpath)
    run = Run(small_config(tmp_path_factory.mktemp("runs"), *OPTIONS))
    questions = load_data(run, "test")
    killed = []

    def kill():
        """The evaluator that has been at work since the first checkpoints."""
        own = {process.pid for process in psutil.Process().children(recursive=True)}
        end = time.time() + 300
        while time.time() < end and not killed:
            there = [p for p in evaluators() if p.ppid() in own]
            if (run.root / ".unfinished" / "eval_dpo").exists() and there:
                there[0].kill()
                killed.append(there[0].pid)
            time.sleep(0.05)

    assassin = threading.Thread(target=kill, daemon=True)
    with Evaluations(run) as evaluations:
        evaluations.start(questions, {name: checkpoints[name] for name in ("base", "sft")})
        evaluations.background.join()
        assassin.start()
        found = evaluations.finish(questions, checkpoints)
    assassin.join()
    assert killed
    return run, questions, found


def test_all_results_are_there_once(evaluated):
    _, questions, found = evaluated
    for name in NAMES:
        rows = found.answers[name].rows()
        assert Counter((row["id"], row["seed"]) for row in rows) == Counter(
            (row["id"], seed) for row in questions.rows() for seed in (None, 0, 1)
        )
    scores = found.scores.rows()
    keys = Counter((row["checkpoint"], row["suite"], row["metric"]) for row in scores)
    assert set(keys.values()) == {1}
    assert {key[0] for key in keys} == set(NAMES)
    assert len(found.comparisons.rows()) == 2 * 6  # greedy and sampled, six pairs


def test_a_second_run_measures_nothing(evaluated, checkpoints):
    run, questions, found = evaluated
    with Evaluations(run) as again:
        assert again.finish(questions, checkpoints).scores.digest == found.scores.digest
        assert not again.actors.started


def test_scores_come_with_intervals_and_what_they_were_measured_with(evaluated, checkpoints, chat):
    _, _, found = evaluated
    scores = {(row["checkpoint"], row["metric"]): row for row in found.scores.rows()}
    for name in NAMES:
        graded = [row["correct"] for row in found.answers[name].rows() if row["seed"] is None]
        greedy = scores[name, "accuracy_greedy"]
        assert (greedy["value"], greedy["n"]) == (sum(graded) / 16, 16)
        assert (greedy["low"], greedy["high"]) == pytest.approx(wilson(sum(graded), 16))
        assert scores[name, "accuracy_sampled"]["seeds"] == [0, 1]
        assert scores[name, "pass@2"]["value"] >= scores[name, "accuracy_sampled"]["value"]
        provenance = greedy["provenance"]
        assert provenance["model"] == checkpoints[name].digest
        assert "temperature" in provenance["sampling"]
        assert provenance["engine"].split()[0] in ("vllm", "transformers")
    assert len({row["provenance"]["template"] for row in found.scores.rows()}) == 1


def test_probabilities_of_texts_are_the_trainers(evaluated, checkpoints, tmp_path):
    """SFT's samples under another checkpoint and back, and the divergences made of them."""
    run, _, found = evaluated
    merged = tmp_path / "merged"
    ModelSource(adapted(checkpoints["spo"].path), checkpoints["spo"].path).merge(merged)
    models = {"sft": load_model(checkpoints["sft"].path).eval(), "spo": load_model(merged).eval()}

    def logp(name, row):
        with torch.inference_mode():
            return completion_logps(models[name], **collate([(row["prompt_ids"], row["ids"])], 0))[0].item()

    rows = Artifact(run.root / "health_spo", "").rows()
    foreign = [row for row in rows if row["written_by"] == "sft"]
    own = [row for row in rows if row["written_by"] == "spo" and row["seed"] == 0]
    back = {row["id"]: row for row in Artifact(run.root / "shift_spo", "").rows()}
    assert len(foreign) == len(own) == len(back) == 6
    for row in foreign:
        assert row["logp"] == pytest.approx(logp("spo", row), abs=1e-3 * len(row["ids"]))
        assert row["logp_author"] == pytest.approx(logp("sft", row), abs=1e-3 * len(row["ids"]))
    for row in own:
        assert row["logp"] == pytest.approx(logp("spo", row), abs=1e-3 * len(row["ids"]))
        assert back[row["id"]]["logp_sft"] == pytest.approx(logp("sft", row), abs=1e-3 * len(row["ids"]))
    scores = {row["metric"]: row["value"] for row in found.scores.rows() if row["checkpoint"] == "spo"}
    assert scores["entropy"] == pytest.approx(-sum(row["logp"] for row in own) / 6)
    gaps = [logp("spo", row) - logp("sft", row) for row in own]
    assert scores["kl_checkpoint_to_sft"] == pytest.approx(sum(gaps) / 6, abs=0.05)
    gaps = [logp("sft", row) - logp("spo", row) for row in foreign]
    assert scores["kl_sft_to_checkpoint"] == pytest.approx(sum(gaps) / 6, abs=0.05)


def test_text_figures_by_hand():
    table = [
        {"response": "a a a a a a", "finished": False, "ids": [1] * 6},
        {"response": "one two", "finished": True, "ids": [1, 2, 3]},
    ]
    found = {metric.metric: metric.value for metric in _text("greedy", table)}
    assert found["greedy/length"] == 4.5
    assert found["greedy/unfinished"] == 0.5
    assert found["greedy/repetition_4"] == pytest.approx((2 / 3) / 2)
    assert found["greedy/longest_run"] == 3.0
    assert found["greedy/distinct_1"] == 3 / 8


def test_pass_at_k_from_the_seeds():
    answers = [
        {"id": str(i), "seed": seed, "correct": correct, "strict": correct}
        for i, graded in enumerate([(1, 0, 0, 0), (1, 1, 1, 1), (0, 0, 0, 0)])
        for seed, correct in [(None, graded[0] == 1), *((s, g == 1) for s, g in enumerate(graded))]
    ]
    found = accuracies(answers)
    assert found["accuracy_sampled"]["value"] == pytest.approx(5 / 12)
    assert found["pass@2"]["value"] == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert found["pass@4"]["value"] == pytest.approx(2 / 3)
    assert "pass@3" not in found


def test_an_adapter_is_merged_into_its_model(checkpoints, tmp_path):
    from peft import PeftModel

    path = checkpoints["spo"].path
    assert is_adapter(path)
    assert not is_adapter(checkpoints["sft"].path)
    moved = tmp_path / "elsewhere"
    shutil.copytree(path.parent, moved)
    ModelSource(adapted(moved / "adapter"), moved / "adapter").merge(tmp_path / "merged")
    expected = PeftModel.from_pretrained(load_model(path.parent / "backbone"), path).eval()
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.inference_mode():
        logits = load_model(tmp_path / "merged").eval()(input_ids=ids).logits
        assert torch.allclose(logits, expected(input_ids=ids).logits, atol=1e-4)


def test_checkpoints_by_themselves_from_the_command_line(
    checkpoints, local_ray, in_root, tmp_path, capsys, monkeypatch
):
    from spo_ray.pipeline.cli import app

    monkeypatch.setattr("spo_ray.pipeline.evaluate_job.connect", lambda config, planned: None)  # the cluster is there
    shared = ["--config", "configs/quickstart.yaml", f"output={tmp_path}", "data.test_questions=8", "eval.seeds=[0]"]
    command = ["evaluate", *shared, "eval.suites=[accuracy]", "engine.type=transformers", "name=mine"]
    named = [f"--checkpoint=one={checkpoints['sft'].path}", f"--checkpoint=two={checkpoints['spo'].path}"]
    assert app([*command, *named], result_action="return_value") == 0
    printed = capsys.readouterr().out
    assert "accuracy_greedy: " in printed
    assert "one          accuracy/accuracy_greedy" in printed
    scores = json.loads((tmp_path / "mine-evaluation" / "scores.json").read_text())
    assert {row["checkpoint"] for row in scores["scores"]} == {"one", "two"}
    assert app([*command, "--checkpoint=nowhere"], result_action="return_value") == 2
    assert app([*command, f"--checkpoint=x={tmp_path}"], result_action="return_value") == 2
    assert "neither config.json nor adapter_config.json" in capsys.readouterr().err


def test_an_evaluator_starts_at_its_first_call_and_its_user_errors_are_user_errors_here(local_ray):
    started = []

    class Broken:
        def describe(self, path):
            raise UserError(f"{path} is no checkpoint")

        def score(self, path, texts):
            raise ValueError("broken")

    def start():
        started.append(ray.remote(num_cpus=0)(Broken).remote())
        return started[-1]

    evaluator = EvaluatorHandle("transformers", start)
    assert not started
    with pytest.raises(UserError, match=r"^there is no checkpoint$"):
        evaluator.describe("there")
    with pytest.raises(RayTaskError, match="broken"):
        evaluator.score("there", [])
    assert len(started) == 1
    ray.kill(started[0])


def test_prompts_that_the_template_refuses_are_wrong_answers_with_their_reason(in_root, toy_base, tmp_path):
    """The reason has the right number in it, and must not count as the answer."""
    config = small_config(tmp_path, "engine.type=transformers", "eval.max_tokens=8")
    refuse = "{% if 'boxes' in messages[-1]['content'] %}{{ raise_exception('no 18 boxes') }}{% endif %}"
    template = refuse + (toy_base / "chat_template.jinja").read_text()
    evaluator = Evaluator("transformers", config.engine, TemplateConfig(chat_template=template))
    (tmp_path / "in").mkdir()
    asked = {"0": "How many boxes?", "1": "How many?", "2": "pens " * 2000}
    table = [{"id": i, "prompt": prompt, "gold": "#### 18"} for i, prompt in asked.items()]
    write_rows(tmp_path / "in" / "part-0.parquet", table, schema.Prompt)
    context = SuiteContext(Run(config), Artifact(tmp_path / "in", "in"), evaluator)
    reasons = {
        "the chat template refuses the messages: no 18 boxes": 2,
        "prompt longer than engine.max_model_len": 2,
    }
    graded = accuracy.measure(context, "base", external(toy_base))
    assert graded.manifest["facts"]["unanswered_counted_wrong"] == reasons
    assert [(r["response"][1:-1], r["correct"]) for r in graded.rows() if r["id"] != "1"] == [
        (reason, False) for reason in reasons for _ in range(2)
    ]
    texts = health.measure(context, "base", external(toy_base))
    assert texts.manifest["rows"]["dropped"] == dict.fromkeys(reasons, 1)
    assert {row["id"] for row in texts.rows()} == {"1"}


def test_texts_of_one_length_have_no_interval_of_their_length():
    table = [{"ids": [1], "response": "a", "finished": True}] * 20
    found = {metric.metric: metric for metric in _text("greedy", table)}
    assert found["greedy/length"][1:] == (1.0, 20, None, None, None, None, ())
    assert found["greedy/repetition_4"][3:6] == (*wilson(0, 20), "wilson")
    mixed = {metric.metric: metric for metric in _text("greedy", [*table, table[0] | {"ids": [1, 1]}])}
    assert mixed["greedy/length"].interval == "bootstrap over prompts"


def test_an_actor_that_is_busy_is_alive_and_one_that_is_not_restarted_is_lost(local_ray):
    @ray.remote(num_cpus=0)
    class Actor:
        def work(self):
            time.sleep(60)

    actor = Actor.remote()
    actor.work.remote()
    require_alive(actor)
    ray.kill(actor)
    with pytest.raises(EvaluatorLostError, match="the evaluation actor is lost: The actor "):
        require_alive(actor)
