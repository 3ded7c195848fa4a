"""The whole job, for real: Ray, vLLM, training, evaluation and the report, on a small configuration."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from spo_ray.config.load import load
from spo_ray.errors import UserError
from spo_ray.pipeline import cli
from spo_ray.pipeline.checks import preflight
from spo_ray.pipeline.cli import guarded
from spo_ray.pipeline.finished import read_finished
from spo_ray.pipeline.job import plan_job
from spo_ray.report.comparison import named, write_reports
from spo_ray.report.run_page import SHOWN_DROPPED
from spo_ray.runtime.artifact import STEP_LOG, Artifact, read_lines
from spo_ray.runtime.cluster import check_resources

from ..cluster import head, submit
from ..helpers import SMALL
from .against_plan import check_against_plan

ROOT = Path(__file__).resolve().parents[2]
TEACHER = "sft_data.teachers=[{model: absent/teacher/here, engine: {type: transformers, gpus: 2, max_model_len: 5000}}]"
REDONE = ["method_spo", "eval_spo", "health_spo", "shift_spo", "scores", "comparisons", "report"]
FIGURES = 5
"""Accuracy, displacement, trajectories, each step's own pairs, text health."""
TRAIN = [sys.executable, "-m", "spo_ray", "run", "--until", "train", "--config", "configs/quickstart.yaml"]
FULL = [sys.executable, "pipelines/full.py", "--config", "configs/quickstart.yaml"]


def run(command, check=True, **options):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=800, **options)
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run, submitted to a cluster, which the tests below look at."""
    output = tmp_path_factory.mktemp("runs")
    arguments = [f"output={output}", *SMALL, "methods={dpo: {type: dpo}, spo: {type: spo}}"]
    with head(tmp_path_factory.mktemp("head")) as environment:
        printed = submit(environment, ["python", *FULL[1:], *arguments])
    assert "joined a cluster" in printed
    return output / "quickstart", arguments, printed


def test_summary_has_every_method_with_its_figures(finished):
    root, _, _ = finished
    summary = json.loads((root / "summary.json").read_text())
    assert list(summary["methods"]) == ["base", "sft", "dpo", "spo"]
    for name, entry in summary["methods"].items():
        greedy, sampled = entry["accuracy_greedy"], entry["accuracy_sampled"]
        assert 0 <= greedy["low"] <= greedy["value"] <= greedy["high"] <= 1
        assert (greedy["n"], sampled["n"], sampled["seeds"]) == (16, 16, [0])
        answers = pq.read_table(root / f"eval_{name}" / "part-0.parquet").to_pylist()
        right = [row["correct"] for row in answers if row["seed"] is None]
        assert greedy["value"] == sum(right) / len(right)
        assert greedy["strict"] == sum(row["strict"] for row in answers if row["seed"] is None) / 16
        for side in ("chosen", "rejected"):
            assert (entry[f"delta_logp_{side}"] is None) == (name in ("base", "sft"))


def test_the_plan_names_the_stages_and_bounds_their_work(finished, in_root, tmp_path):
    root, arguments, _ = finished
    check_against_plan(load(FULL[-1], arguments), root, tmp_path)
    text = run([*FULL, *arguments, "--dry-run"]).stdout
    stages = {path.parent.name for path in root.glob("*/manifest.json")}
    assert set(re.findall(r"^(\w+) +reused ", text, re.MULTILINE)) == stages


def test_stages_account_for_every_row(finished):
    root, _, _ = finished
    for path in root.glob("*/manifest.json"):
        manifest = json.loads(path.read_text())
        dropped = sum(manifest["rows"]["dropped"].values())
        rejected = path.parent / "rejected.parquet"
        assert (pq.read_metadata(rejected).num_rows if rejected.exists() else 0) == dropped
    scored = Artifact(root / "base_scores", "").rows()
    assert len({row["id"] for row in scored}) == 48
    assert all(len(row["samples"]) == len(row["correct"]) == 4 for row in scored)
    facts = json.loads((root / "base_scores" / "manifest.json").read_text())["facts"]
    assert facts["pass@1"] == pytest.approx(sum(sum(r["correct"]) for r in scored) / 192)
    assert facts["pass@4"] == pytest.approx(sum(any(r["correct"]) for r in scored) / 48)


def test_pairs_are_sft_responses_against_wrong_samples(finished):
    root, _, _ = finished
    questions = {r["id"]: r for r in Artifact(root / "sft_scores", "").rows()}
    pairs = Artifact(root / "pairs", "").rows()
    assert pairs
    for pair in pairs:
        question = questions[pair["id"].rpartition("-")[0]]
        assert pair["chosen"] in question["responses"]
        graded = dict(zip((s.strip() for s in question["samples"]), question["correct"], strict=True))
        assert graded[pair["rejected"]] is False


def test_report_is_self_contained(finished):
    root, _, _ = finished
    page = (root / "report" / "index.html").read_text()
    own, _, code = page.partition('<script type="module">')
    assert own.count("<div class=figure>") == FIGURES
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", own)
    assert len(code) > 500_000  # what draws the figures is in the page
    for name in ("base", "sft", "dpo", "spo"):
        assert f">{name}</a></td>" in page


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no Chromium: apt-get install chromium")
@pytest.mark.parametrize("look", [{}, {"color_scheme": "dark"}, {"viewport": {"width": 390, "height": 800}}])
def test_the_report_in_a_browser(finished, look):
    from playwright.sync_api import sync_playwright

    root, _, _ = finished
    with sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(**look)
        messages, asked = [], []
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((root / "report" / "index.html").as_uri())
        page.wait_for_function(f"document.querySelectorAll('.figure svg').length == {FIGURES}", timeout=60_000)
        marks = page.eval_on_selector_all(".figure svg", "all => all.map(svg => svg.querySelectorAll('path').length)")
        assert min(marks) > 10
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")  # wide parts scroll alone
        ink, paper = (page.evaluate(f"getComputedStyle(document.body).{key}") for key in ("color", "backgroundColor"))
        light = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
        assert (light[0] > light[1]) == ("color_scheme" in look)
        browser.close()
    assert not messages
    assert all(url.startswith(("file:", "data:")) for url in asked)


def test_the_report_lists_dropped_rows_by_stage_and_reason(finished):
    root, _, _ = finished
    page = (root / "report" / "index.html").read_text()
    files = list(root.glob("*/rejected.parquet"))
    assert files
    for file in files:
        dropped = pq.read_table(file).to_pylist()
        for reason in {row["reason"] for row in dropped}:
            ids = [row["id"] for row in dropped if row["reason"] == reason]
            assert f"{file.parent.name}: {len(ids)} {reason}" in page
            assert all(f"<td>{row_id}</td>" in page for row_id in ids[:SHOWN_DROPPED])


def test_a_finished_run_gets_its_page_again_and_is_compared_without_a_cluster(finished, tmp_path, capsys):
    root, _, _ = finished

    def page():  # but for its time: the run has ended since it was written
        return re.sub(r"; took [^<]*", "", (root / "report" / "index.html").read_text())

    before = page()
    shutil.rmtree(root / "report")
    other = shutil.copytree(root, tmp_path / "other")
    assert guarded(lambda: write_reports(named([read_finished(root)]), None)) == 0
    assert page() == before
    assert (
        guarded(lambda: write_reports(named([read_finished(root), read_finished(other)]), tmp_path / "both.html")) == 0
    )
    assert "ray: started" not in capsys.readouterr().out
    both = (tmp_path / "both.html").read_text()
    for label in ("quickstart", "other"):
        for name in ("base", "sft", "dpo", "spo"):
            assert re.search(rf">{label}(</a>)?</td><td><a [^>]*>{name}</a></td>", both)
    assert "Settings that differ</h2>\n<p class=note>None.</p>" in both


def test_progress_is_reported_while_sampling_and_training(finished):
    _, _, output = finished
    assert re.search(r"engine: answers come from (vllm|transformers) \(", output)
    assert re.search(r"base_samples: done in .*48 rows read, 48 kept", output)
    assert "method_spo: done" in output


def test_the_same_command_reuses_everything_and_a_change_redoes_its_part_only(finished):
    _, arguments, _ = finished
    again = run([*FULL, *arguments]).stdout
    assert not re.search(r": started$", again, re.M)
    plan = run([*FULL, *arguments, "--dry-run", "methods.spo.lambda_sft=2"]).stdout
    assert re.findall(r"^(\w+) +build ", plan, re.M) == REDONE
    assert re.search(r"^  method_spo +method\.lambda_sft 1\.0 -> 2\.0$", plan, re.M)
    changed = run([*TRAIN, *arguments, "methods.spo.lambda_sft=2"]).stdout
    assert re.findall(r"(\w+): started$", changed, re.M) == ["method_spo"]


def test_the_exported_model_loads_anywhere(finished):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    root, _, _ = finished
    model = AutoModelForCausalLM.from_pretrained(root / "method_dpo")
    tokenizer = AutoTokenizer.from_pretrained(root / "method_dpo")
    chat = [{"role": "user", "content": "Each of 2 bags holds 3 pens. How many pens do the bags hold?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert model.dtype == torch.float32
    assert model.generate(**inputs, max_new_tokens=8, do_sample=False).shape[1] > inputs["input_ids"].shape[1]


def interrupted(arguments, line, number=signal.SIGINT):
    """Exit code and standard error of the whole job, sent a signal two seconds after it printed ``line``."""
    command = ["env", "--default-signal=INT", *FULL, *arguments]  # which is ignored where tests run in the background
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    for printed in process.stdout:
        if line in printed:
            break
    time.sleep(2)
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def test_an_interrupt_keeps_what_is_finished(tmp_path):
    arguments = [f"output={tmp_path}", *SMALL, "data.train_questions=40"]
    code, errors = interrupted(arguments, "base_samples: started", signal.SIGTERM)  # what schedulers send
    assert code == 130, errors[-2000:]
    assert errors == "stopped; finished stages are kept: the same command resumes the run\n"  # and nothing of Ray's
    status = json.loads((tmp_path / "quickstart" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("stopped", 130)
    assert finished_stages(tmp_path) == ["data_test", "data_train"]


def finished_stages(output):
    return sorted(p.parent.name for p in (output / "quickstart").glob("*/manifest.json"))


def test_an_interrupt_while_methods_train(finished):
    root, arguments, _ = finished
    before = finished_stages(root.parent)
    code, errors = interrupted([*arguments, "methods={more: {type: dpo, beta: 0.1}}"], "method_more: started")
    assert code == 130, errors[-2000:]
    assert finished_stages(root.parent) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.typo=1"], "unknown key"),
        (["ray.num_cpus=1"], "too few resources: base_samples needs"),
        (["ray.address=127.0.0.1:1"], "no Ray cluster at 127.0.0.1:1"),
        (["ray.address=head"], "no Ray cluster at head: start one, or unset ray.address and RAY_ADDRESS"),
    ],
)
def test_bad_input_is_refused_before_anything_long(tmp_path, arguments, message):
    started = time.time()
    done = run([*FULL, f"output={tmp_path}", *arguments], check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert time.time() - started < 120


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sft.epochs=many"], "valid integer"),
        (["model.path=assets/absent"], "no model in assets/absent"),
        ([TEACHER], "no teacher in absent/teacher/here"),
        (["model.path=/absent/model"], "no model in /absent/model"),
        (["data={type: gsm8k, path: absent}"], "no data file absent"),
        (["data={type: preference, path: absent}"], "no data file absent"),
    ],
)
def test_bad_input_exits_with_2_and_one_message(in_root, tmp_path, capsys, arguments, message):
    assert cli.run(f"output={tmp_path}", *arguments, config=in_root / "configs" / "quickstart.yaml") == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert message in errors


def test_a_model_without_chat_template_is_refused(in_root, tmp_path, toy_base):
    bare = tmp_path / "bare"
    shutil.copytree(toy_base, bare)
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template"):
        preflight(load(FULL[-1], [f"model.path={bare}"]))


@pytest.mark.parametrize(
    ("overrides", "nodes", "message"),
    [
        ([], [{"CPU": 2.0}], None),
        ([], [{"CPU": 1.0}], "base_samples needs 1 actors of 1 CPUs and 0 GPUs and 1 CPU for data tasks"),
        (["train.num_workers=3", "train.parallel_methods=2"], [{"CPU": 4.0}], "method_nll needs 6 actors"),
        (["train.num_workers=3", "train.parallel_methods=1"], [{"CPU": 2.0}, {"CPU": 2.0}], None),
        (
            ["train.num_workers=2", "train.cpus_per_worker=2", "train.parallel_methods=1"],
            [{"CPU": 3.0}, {"CPU": 1.0}],
            "sft needs 2 actors",
        ),
        (["engine.gpus=1"], [{"CPU": 8.0}], "the cluster has 8 CPUs and 0 GPUs"),
        ([TEACHER], [{"CPU": 8.0}], "teacher1_samples needs 1 actors of 1 CPUs and 2 GPUs"),
        ([TEACHER, "train.use_gpu=false", "engine.gpus=0"], [{"CPU": 8.0, "GPU": 2.0}], None),
        (["train.use_gpu=true", "engine.gpus=1"], [{"CPU": 8.0, "GPU": 1.0}], "method_nll needs 2 actors"),
        (["train.use_gpu=true", "engine.gpus=1"], [{"CPU": 8.0, "GPU": 2.0}], None),
    ],
)
def test_plans_are_compared_with_the_cluster(in_root, tmp_path, overrides, nodes, message):
    planned = plan_job(load(FULL[-1], [*overrides, f"output={tmp_path}"])).planned
    if message is None:
        check_resources(planned, nodes)
    else:
        with pytest.raises(UserError) as caught:
            check_resources(planned, nodes)
        assert message in str(caught.value)


@pytest.mark.slow
def test_pairs_without_sft_train_the_model_itself(in_root, tmp_path, toy_base):
    """The model has no chat template of its own: the configuration's is used wherever the model is loaded."""
    bare = shutil.copytree(toy_base, tmp_path / "bare")
    model = {"path": str(bare), "chat_template": (bare / "chat_template.jinja").read_text()}
    (bare / "chat_template.jinja").unlink()
    rows = [{"prompt": f"How many are {i} x 7?", "chosen": f"#### {7 * i}", "rejected": f"{i}"} for i in range(2, 26)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        "sft=null",
        f"model={json.dumps(model)}",
        f"output={tmp_path}",
        f"data.path={tmp_path}/pairs.jsonl",
        "data.test_pairs=8",
        "methods={dpo: {type: dpo}}",
        "engine.type=transformers",
        "eval.health_prompts=8",
        "eval.max_tokens=16",
    ]
    run([*FULL[:-1], "configs/preferences.yaml", *arguments])
    root = tmp_path / "preferences"
    check_against_plan(load("configs/preferences.yaml", arguments), root, tmp_path)
    assert not list(root.glob("sft*"))
    first = read_lines(root / "method_dpo" / STEP_LOG)[1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)  # the reference is what training starts from
    summary = json.loads((root / "summary.json").read_text())["methods"]
    assert list(summary) == ["reference", "dpo"]
    assert "health/kl_reference_to_checkpoint" not in summary["reference"]["scores"]
    moved = summary["dpo"]["scores"]["health/kl_reference_to_checkpoint"]
    assert moved["n"] == 8
    assert moved["value"] != 0
    assert list(read_finished(root).methods) == ["dpo"]


TWO_LAMBDAS = "sweep.space={methods.spo.lambda_sft: {type: grid, values: [0.1, 1.0]}}"
WITHOUT_SFT = {
    "configs/quickstart.yaml": ["run", "rounds=2", "methods={dpo: {type: dpo}, spo: {type: spo}}"],
    "configs/sweeps/toy.yaml": ["sweep", TWO_LAMBDAS, "sweep.validation={questions: 12, pairs: 4}"],
}


@pytest.mark.slow
@pytest.mark.parametrize("config", WITHOUT_SFT)
def test_rounds_and_sweeps_without_sft_compare_with_the_model_itself(in_root, tmp_path, config):
    command, *arguments = WITHOUT_SFT[config]
    arguments += [*(x for x in SMALL if not x.startswith("sft.")), "sft=null", "name=a", f"output={tmp_path}"]
    run([sys.executable, "-m", "spo_ray", command, "--config", config, *arguments])
    root = tmp_path / "a"
    check_against_plan(load(config, arguments), root, tmp_path)
    summary = json.loads((root / "summary.json").read_text())
    compared = summary["methods"] if command == "run" else summary["test"]
    first, *trained = compared
    assert (first, len(trained)) == ("reference", 2 if command == "run" else 1)
    assert {row["second"] for row in summary["comparisons"] if row["first"] == "reference"} >= set(trained)
    assert {r["rejected_source"].split(":")[0] for r in Artifact(root / "pairs", "").rows()} == {"reference_samples"}
    assert not re.search(r"\bSFT\b|\bsft\b[^_&]", (root / "report" / "index.html").read_text())


def test_usage_errors_exit_with_2():
    assert run([sys.executable, "pipelines/full.py", "--cnfig", "x"], check=False).returncode == 2


@pytest.mark.parametrize("rounds", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_real_gsm8k_questions_run_through_the_whole_job(in_root, tmp_path, shared_data, rounds):
    config = "configs/gsm8k/tiny-cpu.yaml"
    arguments = [
        f"output={tmp_path}",
        f"data.path={shared_data}/gsm8k",
        "data.train_questions=12",
        "data.test_questions=4",
        "data.contamination_words=13",
        "engine.type=transformers",
        "sampling.max_tokens=96",
        "eval.max_tokens=64",
        "methods={spo: {type: spo}}",
        f"rounds={rounds}",
    ]
    run([sys.executable, "pipelines/full.py", "--config", config, *arguments])
    root = tmp_path / "gsm8k-tiny-cpu"
    check_against_plan(load(config, arguments), root, tmp_path)
    summary = json.loads((root / "summary.json").read_text())
    assert summary["methods"]["spo"]["accuracy_greedy"]["n"] == 4
    assert summary["methods"]["spo"]["pairs"] > 0
    questions = {json.loads(line)["question"] for line in (shared_data / "gsm8k" / "train.jsonl").open()}
    for suffix in ("", "_spo_round2")[:rounds]:
        pairs = Artifact(root / f"pairs{suffix}", "").rows()
        assert pairs
        assert all(pair["prompt"][0]["content"] in questions for pair in pairs)
        assert {pair["rejected_source"].split(":")[0] for pair in pairs} == {f"{suffix[1:] or 'sft'}_samples"}
    first, last = root / "method_spo", root / ("method_spo" if rounds == 1 else "method_spo_round2")
    if rounds == 2:
        assert json.loads((last / "manifest.json").read_text())["inputs"]["model"] == digest_of(first)
    assert json.loads((root / "eval_spo" / "manifest.json").read_text())["inputs"]["model"] == digest_of(last)


def digest_of(stage):
    return json.loads((stage / "manifest.json").read_text())["digest"]


@pytest.mark.slow
def test_real_preference_pairs_run_through_the_whole_job(in_root, tmp_path, shared_data):
    config = "configs/ultrafeedback/tiny-cpu.yaml"
    arguments = [f"output={tmp_path}", f"data.path={shared_data}/ultrafeedback", "data.train_pairs=24"]
    arguments += ["data.contamination_words=13", "pairs.dedup=near", f"sft.data={{path: {tmp_path}/own.jsonl}}"]
    own = [json.loads(line) for line in (shared_data / "gsm8k" / "train.jsonl").read_text().splitlines()[:9]]
    rows = [{"prompt": row["question"], "completion": row["answer"]} for row in own]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run([sys.executable, "pipelines/full.py", "--config", config, *arguments])
    root = tmp_path / "ultrafeedback-tiny-cpu"
    check_against_plan(load(config, arguments), root, tmp_path)
    summary = json.loads((root / "summary.json").read_text())
    assert summary["methods"]["spo"]["accuracy_greedy"] is None
    assert summary["methods"]["spo"]["held_out"]["reward_accuracy"]["n"] > 0
    kept = json.loads((root / "pair_tokens" / "manifest.json").read_text())["rows"]
    assert kept["read"] == 24 == kept["kept"] + sum(kept["dropped"].values())
    learned = Artifact(root / "sft_tokens", "").rows()
    assert json.loads((root / "sft" / "manifest.json").read_text())["rows"]["read"] == len(learned) == len(own)
