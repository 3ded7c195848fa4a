import importlib
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
PIPELINE_ONLY = ("ray", "vllm", "pydantic", "datasets", "pyarrow", "altair", "cyclopts", "ruamel")
LINE = re.compile(r"step (\d+)  loss (\S+)  logps/chosen (\S+)  logps/rejected (\S+)")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the wheel's files, and nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    shell(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder), cwd=ROOT)
    (wheel,) = folder.glob("spo_ray-*.whl")
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    pip = [uv, "pip", "install", "--offline", "--no-cache", "--python", sys.executable]
    if uv is None:
        pip = [sys.executable, "-m", "pip", "install", "--no-index"]
    shell(*pip, "--no-deps", "--target", str(folder / "site"), str(wheel), cwd=folder)
    return folder / "site"


@pytest.fixture
def example(monkeypatch):
    """Imports an example as its neighbours see it."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    yield importlib.import_module
    sys.modules.pop("plain_pytorch", None)


def shell(*command, cwd, **env):
    done = subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def python_without(missing, code, installed):
    """Runs code outside the repository, as if the packages were not installed."""
    # None in sys.modules is what both import and importlib.util.find_spec take for a package that is not there.
    code = f"import sys\nfor name in {tuple(missing)!r}: sys.modules[name] = None\n{code}"
    return shell(sys.executable, "-c", code, cwd=installed.parent, PYTHONPATH=str(installed), OMP_NUM_THREADS="1")


def origin_of_spo_ray(output):
    return Path(output.splitlines()[-1]).resolve()


def test_the_wheel_offers_the_whole_core_with_nothing_but_torch_beside_it(installed):
    code = "import spo_ray.core\nfor name in spo_ray.core.__all__: assert callable(getattr(spo_ray.core, name)), name\n"
    code += "from spo_ray.core import alpha_dpo, completion_logps, dpo, DualVariable, forecast, spo_gradients\n"
    code += "print(spo_ray.core.__file__)"
    output = python_without([*PIPELINE_ONLY, "transformers", "peft"], code, installed)
    assert origin_of_spo_ray(output) == (installed / "spo_ray" / "core" / "__init__.py").resolve()


def test_the_import_blocker_blocks(installed):
    code = "import importlib.util\n"
    code += f"for name in {PIPELINE_ONLY!r}:\n"
    code += "    assert importlib.util.find_spec(name) is None\n"
    code += "    try: __import__(name)\n    except ImportError: print(name)\n"
    assert python_without(PIPELINE_ONLY, code, installed).split() == list(PIPELINE_ONLY)


def run_example(name, missing, installed, toy_base):
    """Runs an example for three steps from the wheel alone; what it prints."""
    script = str(ROOT / "examples" / name)
    code = f"sys.argv = [{script!r}, '--model', {str(toy_base)!r}, '--steps', '3']\n"
    code += f"import runpy; sys.path.insert(0, {str(ROOT / 'examples')!r})\n"
    code += f"runpy.run_path({script!r}, run_name='__main__')\nimport spo_ray; print(spo_ray.__file__)"
    output = python_without(missing, code, installed)
    assert origin_of_spo_ray(output) == (installed / "spo_ray" / "__init__.py").resolve()
    return output


def test_without_the_pipelines_packages_the_command_says_what_to_install(installed):
    code = "from contextlib import redirect_stderr\nfrom spo_ray.__main__ import main\n"
    code += "with redirect_stderr(sys.stdout):\n    try: main()\n    except SystemExit as ended: print(ended.code)"
    message, code = python_without(PIPELINE_ONLY, code, installed).splitlines()
    assert message == "error: no package cyclopts: the command line needs pip install 'spo-ray[cpu]'"
    assert code == "2"


def test_the_plain_loop_runs_from_the_wheel_without_the_pipelines_packages(installed, toy_base):
    rows = LINE.findall(run_example("plain_pytorch.py", PIPELINE_ONLY, installed, toy_base))
    assert [row[0] for row in rows] == ["1", "2", "3"]
    assert all(math.isfinite(float(value)) for row in rows for value in row[1:])


def test_the_trainer_runs_from_the_wheel_without_the_pipelines_packages(installed, toy_base):
    missing = [name for name in PIPELINE_ONLY if name != "pyarrow"]
    output = run_example("hf_trainer.py", missing, installed, toy_base)
    losses = [float(value) for value in re.findall(r"'loss': '?([\d.]+)", output)]
    assert len(losses) == 3
    assert losses[0] == pytest.approx(math.log(2), abs=1e-3)
    saved = AutoModelForCausalLM.from_pretrained(installed.parent / "spo-model", dtype=torch.float32).state_dict()
    start = AutoModelForCausalLM.from_pretrained(toy_base, dtype=torch.float32).state_dict()
    assert all(not torch.equal(value, start[name]) for name, value in saved.items())


def test_the_plain_loop_raises_the_preferred_answers_and_lowers_the_loss(example, toy_base, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plain_pytorch.py", "--model", str(toy_base), "--steps", "12"])
    example("plain_pytorch").main()
    rows = [[float(value) for value in row] for row in LINE.findall(capsys.readouterr().out)]
    _, loss, chosen, _ = zip(*rows, strict=True)
    assert len(rows) == 12
    assert loss[0] == pytest.approx(math.log(2), abs=1e-3)  # policy and reference are the same before the first step
    assert loss[-1] < 0.5 * loss[0]
    assert chosen[-1] > chosen[0] + 1


def test_labels_cover_the_answer_and_its_end_alone(example, toy_base):
    plain, tokenizer = example("plain_pytorch"), AutoTokenizer.from_pretrained(toy_base)
    batch = plain.collate([plain.encode(pair, tokenizer) for pair in plain.PAIRS])
    for side in plain.SIDES:
        ids, labels = batch[f"{side}_input_ids"], batch[f"{side}_labels"]
        assert torch.equal(labels[labels != -100], ids[labels != -100])
        texts = [tokenizer.decode(row[row != -100]) for row in labels]
        assert texts == [pair[side] + "<|end|>" for pair in plain.PAIRS]
        shown = [
            tokenizer.decode(row[mask == 1]) for row, mask in zip(ids, batch[f"{side}_attention_mask"], strict=True)
        ]
        openings = [f"<|user|>{pair['prompt']}<|end|><|assistant|>" for pair in plain.PAIRS]
        assert shown == [opening + text for opening, text in zip(openings, texts, strict=True)]
