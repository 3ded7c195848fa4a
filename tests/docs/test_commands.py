"""Every command in the documentation is run, or stands below with the reason why not.

Commands that look at something run as they are. Those that train are read here with their configuration, and run in the
slow tests on small data; names of files in the pages stand for files made here.
"""

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spo_ray.config.load import load
from spo_ray.pipeline import cli, doctor
from spo_ray.pipeline.init import text_for

from ..cluster import RAY, free_port, head, submit
from ..conftest import ROOT
from ..helpers import SMALL
from ..pipeline.against_plan import check_against_plan
from .pages import inline_commands, shell_commands

LISTED = {
    ". .venv/bin/activate": "concerns the shell alone",
    "export ": "concerns the shell alone",
    "ssh ": "needs a second machine",
    "ray up": "starts machines; the file is checked against the launcher's schema in tests/test_deploy.py",
    "ray down": "as ray up",
    "ray job stop": "needs a job under way; tests/runtime/test_supervisor.py stops one",
    "ray stop": "ends every Ray process of the machine",
    "docker ": "needs a Docker daemon; the file is linted in tests/test_deploy.py",
    "kubectl ": "needs a Kubernetes cluster; the file is checked in tests/test_deploy.py",
    "pip install": "installs packages; tests/test_examples.py runs the examples from the wheel alone",
    "python -m hatchling": "as pip install",
    "spo-ray chat": "needs a finished run; tests/model/test_chat.py",
    "vllm serve": "a server for a trained model; tests/test_served.py starts engines on them",
    "python convert_hf_to_gguf.py": "a script of llama.cpp's",
    "ollama create": "needs Ollama",
    "hf upload": "needs the hub",
    "make setup": "installs packages; .ci/run does it from scratch",
    "make check": ".ci/run does it",
    "make lock": "asks package registries for new versions",
    "make docs": "rewrites a page; tests/test_docs.py does it elsewhere",
    "make site": "fetches mkdocs; a slow test in tests/docs/test_pages.py builds it",
    "make test": "these tests",
    "make real": "half an hour of real weights; tests/model has the import and the real weights in parts",
    "python scripts/fetch_smollm2.py": "fetches 93 MB; the tests with real weights do it",
    "spo-ray run --config configs/smollm2/word_problems.yaml": "as make real",
    "make study": "hours of trainings; tests/test_study.py has its parts",
    "make results": "rewrites pages; tests/test_study.py and tests/test_real_weights_study.py do it elsewhere",
    "make bench": "40 minutes of measurements",
    "make soak": "many hours of faults; tests/soak has its parts",
    "python scripts/compare_vllm.py": "asks a package index; tests/test_security.py makes a wheel for it",
    "python -m benchmarks.": "measurements that take tens of minutes; here they print their help",
    "python scripts/make_toy_model.py": "trains the toy base anew, and replaces it",
    "pre-commit install": "changes the repository's hooks",
    "python pipelines/paper_figures.py": "tests/pipeline/test_paper_figures.py and tests/report/test_paper.py run all",
    "spo-ray import-gguf": "needs a GGUF file; tests/model/test_gguf.py writes some",
    "spo-ray report runs/": "tests/pipeline/test_job.py writes pages of finished runs",
}
ON_A_CLUSTER = ("ray get-auth-token", "ray start", "ray job submit")
LOOKING = {"plan", "inspect", "score", "doctor", "init", "--help", "--dry-run"}
TOY = [*SMALL, "methods={dpo: {type: dpo}, spo: {type: spo}}"]
SMALLER = {
    "configs/quickstart.yaml": TOY,
    "configs/preferences.yaml": ["data.train_pairs=16", "data.test_pairs=8", "eval.max_tokens=32", "engine.cpus=1"],
    "configs/gsm8k/tiny-cpu.yaml": ["sampling.max_tokens=64", "eval.max_tokens=64", "methods={spo: {type: spo}}"],
    "configs/sweeps/toy.yaml": [
        *SMALL,
        "sweep.space={methods.spo.lambda_sft: {type: grid, values: [1.0]}}",
        "sweep.validation={questions: 12, pairs: 4}",
        "sweep.score_at=[1.0]",
    ],
}
BIN = Path(sys.executable).parent
REPLACED = re.compile(r"(name|output)=")


def listed(command):
    return next((start for start in LISTED if command.startswith(start)), None)


def on_a_cluster(command):
    return command.startswith(ON_A_CLUSTER) or "ray.address=auto" in command


def expanded(command):
    """What a target of the Makefile runs; any other command as it is; without variables that are set before."""
    words = shlex.split(command)
    while re.match(r"\w+=", words[0]):
        words.pop(0)
    if words[0] != "make" or listed(command):
        return shlex.join(words)
    recipe = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (line,) = re.findall(r"^\.venv/bin/(python pipelines/.*)$", recipe, re.MULTILINE)
    return line


IN_BLOCKS = [expanded(command) for command in shell_commands()]
HERE = [command for command in IN_BLOCKS if not listed(command) and not on_a_cluster(command)]
LOOKS = [command for command in HERE if LOOKING & set(command.split())]
TRAINS = [command for command in HERE if command not in LOOKS]
NAMED = [c for c in inline_commands() if not (listed(c) or on_a_cluster(c) or c in shell_commands())]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What the pages' file names stand for."""
    folder = tmp_path_factory.mktemp("user")
    pairs = [
        {"prompt": f"How many are {a} x {b}?", "chosen": f"#### {a * b}", "rejected": f"#### {a + b + 1}"}
        for a in range(2, 13)
        for b in range(2, 13)
    ]
    questions = [{"question": f"{a} + {a + 1} = ?", "answer": f"#### {2 * a + 1}", "response": "5"} for a in range(12)]
    sides = {"instruction": "i", "output_1": "one", "output_2": "two", "generator_1": "base", "generator_2": "new"}
    (folder / "gsm8k").mkdir()
    for name, table in {
        "preferences.jsonl": pairs,
        "sft.jsonl": [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs],
        "answers.jsonl": questions,
        "gsm8k/train.jsonl": questions,
        "gsm8k/test.jsonl": questions[:4],
    }.items():
        (folder / name).write_text("\n".join(map(json.dumps, table)))
    (folder / "annotations.json").write_text(json.dumps([sides | {"preference": 2.0}, sides | {"preference": 1.5}]))
    shutil.copytree(ROOT / "assets" / "toy_base", folder / "model")
    mine = text_for(folder / "mine.yaml", str(folder / "preferences.jsonl"), str(folder / "model"), "cpu")
    (folder / "mine.yaml").write_text(mine)
    return {
        "preferences.jsonl": folder / "preferences.jsonl",
        "sft.jsonl": folder / "sft.jsonl",
        "answers.jsonl": folder / "answers.jsonl",
        "annotations.json": folder / "annotations.json",
        "data/gsm8k": folder / "gsm8k",
        "models/mine": folder / "model",
        "mine.yaml": folder / "mine.yaml",
        "runs/quickstart/sft": ROOT / "assets" / "toy_base",
    }


def words_of(command, files):
    """A command's words, with the files made here."""
    words = shlex.split(command)
    for name, path in files.items():
        words = [re.sub(rf"(?<![\w/]){re.escape(name)}$", str(path), word) for word in words]
    return words


def run_here(words, monkeypatch):
    """In this process, since imports take most of the time; the exit code."""
    if words[0] == "spo-ray":
        return int(cli.app(words[1:], exit_on_error=False, result_action="return_value") or 0)
    monkeypatch.setattr(sys, "argv", words[1:])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(words[1], run_name="__main__")
    return ended.value.code


@pytest.mark.filterwarnings("ignore:Cyclopts application invoked")  # scripts read sys.argv
@pytest.mark.parametrize("command", LOOKS)
def test_commands_that_look_at_something(in_root, files, monkeypatch, capsys, tmp_path, command):
    monkeypatch.setattr(doctor, "CHECKS", [])  # those of the machine are run in test_doctor
    words = words_of(command, files)
    if "--config" in words:
        words.append(f"output={tmp_path}")
    if words[1] == "init":
        files["mine.yaml"].unlink()  # it writes the same
    assert run_here(words, monkeypatch) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("command", TRAINS)
def test_commands_that_train_have_a_valid_configuration(in_root, files, command):
    program, *words = words_of(command, files)
    if program == "python":  # a script takes what `spo-ray run` takes
        assert (ROOT / words[0]).exists()
        words[0] = "run"
    _, bound, _ = cli.app.parse_args(words, exit_on_error=False, print_error=False)
    given = bound.arguments
    assert load(given["config"], given.get("overrides", ())).methods


def test_every_command_is_run_or_listed():
    for command in [*HERE, *NAMED]:
        assert re.match(r"spo-ray |python pipelines/", command), f"run it, or list it with a reason: {command}"
    everything = [*shell_commands(), *inline_commands(), *IN_BLOCKS]
    for start in [*LISTED, *ON_A_CLUSTER]:
        assert any(command.startswith(start) for command in everything), f"no page has {start}"


@pytest.mark.parametrize("command", NAMED)
def test_commands_that_the_text_names_exist(capsys, command):
    """With the options that stand beside them."""
    program, *words = shlex.split(command)
    assert program == "spo-ray"
    cut = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    assert cli.app([*words[:cut], "--help"], exit_on_error=False, result_action="return_value") in (None, 0)
    shown = capsys.readouterr().out
    assert all(word in shown for word in words[cut:] if word.startswith("--"))


@pytest.mark.parametrize("name", sorted(set(re.findall(r"-m (benchmarks\.\w+)", "\n".join(IN_BLOCKS)))))
def test_benchmarks_have_help(monkeypatch, capsys, name):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(name, run_name="__main__")
    assert ended.value.code == 0
    assert name in capsys.readouterr().out


def small(words, output):
    """A command's words on small data, in one folder: commands share what they have in common."""
    at = words.index("--config") + 2
    documented = [word for word in words[at:] if not REPLACED.match(word)]
    return [
        *words[:at],
        *SMALLER.get(words[at - 1], SMALLER["configs/preferences.yaml"]),
        *documented,
        "preference.epochs=1",
        f"output={output}",
        "name=docs",
    ]


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def without_names(command):
    return shlex.join(word for word in shlex.split(command) if not REPLACED.match(word))


@pytest.mark.slow
@pytest.mark.parametrize("command", list(dict.fromkeys(map(without_names, TRAINS))))
def test_commands_that_train(in_root, files, output, tmp_path, command):
    words = small(words_of(command, files), output)
    done = subprocess.run([BIN / words[0], *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    if "evaluate" not in words:
        config = load(words[words.index("--config") + 1], [word for word in words if re.match(r"[\w.]+=", word)])
        if "--until" not in words:
            check_against_plan(config, output / "docs", tmp_path, shared=True)
        assert json.loads((output / "docs" / "status.json").read_text())["state"] == "finished"


@pytest.mark.slow
def test_commands_on_a_cluster(files, tmp_path, tmp_path_factory):
    """The head is started by `ray start --head`, with ports of its own."""
    commands = [command for command in IN_BLOCKS if on_a_cluster(command)]
    with head(tmp_path_factory.mktemp("head")) as environment:
        for command in commands:
            words = [word.replace("FIRST:6379", environment["GCS"]) for word in words_of(command, files)]
            if command.startswith("ray get-auth-token"):
                unset = {key: value for key, value in environment.items() if key != "RAY_AUTH_TOKEN"}  # or it is taken
                done = run_apart([RAY, *words[1:]], unset | {"HOME": str(tmp_path)})
                assert len((tmp_path / ".ray" / "auth_token").read_text().strip()) >= 32, done
            elif "--address" in command:
                joined(words, environment, tmp_path)
            elif command.startswith("ray job submit"):
                job = words[words.index("--") + 1 :]
                assert "finished; results in" in submit(environment, small(job, tmp_path))
            elif command != "ray start --head":
                words = [word.replace("ray.address=auto", f"ray.address={environment['GCS']}") for word in words]
                printed = run_apart([str(BIN / words[0]), *words[1:]], environment)
                assert "FAILED" not in printed


def run_apart(words, environment):
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def joined(words, environment, folder):
    """A node that starts, joins, and is ended again."""
    options = ["--block", "--num-cpus=1", f"--dashboard-agent-listen-port={free_port()}"]
    with (folder / "node.log").open("w") as log:
        node = subprocess.Popen(
            [RAY, *words[1:], *options], env=environment | {"PYTHONUNBUFFERED": "1"}, stdout=log, stderr=log
        )
    try:
        for _ in range(600):
            if "Ray runtime started" in (folder / "node.log").read_text():
                return
            assert node.poll() is None, (folder / "node.log").read_text()
            time.sleep(0.5)
    finally:
        node.terminate()
        node.wait(timeout=60)
