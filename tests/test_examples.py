import copy
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
from transformers import AutoTokenizer, TrainerCallback, TrainingArguments

from spo_ray.core import spo_gradients

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
    for name in ("plain_pytorch", "hf_trainer"):
        sys.modules.pop(name, None)


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


def test_the_plain_loop_runs_from_the_wheel_without_the_pipelines_packages(installed, toy_base):
    script = str(ROOT / "examples" / "plain_pytorch.py")
    code = f"sys.argv = [{script!r}, '--model', {str(toy_base)!r}, '--steps', '3']\n"
    code += f"import runpy; runpy.run_path({script!r}, run_name='__main__')\n"
    code += "import spo_ray; print(spo_ray.__file__)"
    output = python_without(PIPELINE_ONLY, code, installed)
    rows = LINE.findall(output)
    assert [row[0] for row in rows] == ["1", "2", "3"]
    assert all(math.isfinite(float(value)) for row in rows for value in row[1:])
    assert origin_of_spo_ray(output) == (installed / "spo_ray" / "__init__.py").resolve()


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


class Watch(TrainerCallback):
    """What the optimizer was given at the first step."""

    grads = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.grads is None:
            self.grads = {name: p.grad.clone() for name, p in model.named_parameters()}


def trained(example, toy_base, folder, **options):
    """A finished run on four pairs, what it started from, and the micro-batches that it saw."""
    torch.manual_seed(0)
    plain, hf = example("plain_pytorch"), example("hf_trainer")
    tokenizer, model = AutoTokenizer.from_pretrained(toy_base), plain.load(toy_base)
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        learning_rate=plain.BACKBONE_RATE,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    seen, watch, start = [], Watch(), copy.deepcopy(model)

    def collate(rows):
        seen.append(hf.collate_with_reference(rows))
        return seen[-1]

    trainer = hf.SpoTrainer(
        model=model,
        args=args,
        train_dataset=hf.prepare(plain.PAIRS, tokenizer, model),
        data_collator=collate,
        callbacks=[watch],
        spo=plain.SPO,
        adapter_rate=plain.ADAPTER_RATE,
    )
    trainer.train()
    return trainer, watch, start, seen


def own_gradients(example, model, batch):
    plain = example("plain_pytorch")
    backbone, adapters = plain.names(model)
    return spo_gradients(model, batch, backbone=backbone, adapters=adapters, **plain.SPO)


def test_trainer_accumulates_the_mean_of_the_micro_batches_gradients(example, toy_base, tmp_path):
    options = {"gradient_accumulation_steps": 2, "max_steps": 3, "max_grad_norm": 0.0}
    trainer, watch, start, seen = trained(example, toy_base, tmp_path, **options)
    first, second = (own_gradients(example, start, batch) for batch in seen[:2])
    assert set(watch.grads) == set(first[0])
    for name, grad in watch.grads.items():
        torch.testing.assert_close(grad, (first[0][name] + second[0][name]) / 2)
    *steps, _ = trainer.state.log_history
    assert len(steps) == 3 and all(math.isfinite(log["loss"]) for log in steps)
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    for key in ("logps/chosen", "spo/R", "spo/term_b_norm"):
        assert steps[0][key] == pytest.approx((first[1][key] + second[1][key]) / 2, rel=1e-4)
    assert steps[-1]["logps/chosen"] > steps[0]["logps/chosen"]


def test_trainer_weighs_an_epochs_short_last_step_by_its_own_batches(example, toy_base, tmp_path):
    options = {"gradient_accumulation_steps": 4, "max_steps": 1, "max_grad_norm": 0.0}
    _, watch, start, seen = trained(example, toy_base, tmp_path, **options)
    first, second = (own_gradients(example, start, batch)[0] for batch in seen[:2])
    for name, grad in watch.grads.items():
        torch.testing.assert_close(grad, (first[name] + second[name]) / 2)


def test_trainer_clips_the_whole_gradient(example, toy_base, tmp_path):
    _, watch, start, seen = trained(example, toy_base, tmp_path, max_steps=1, max_grad_norm=0.5)
    grads, _ = own_gradients(example, start, seen[0])
    norm = torch.stack([g.norm() for g in grads.values()]).norm()
    for name, grad in watch.grads.items():
        torch.testing.assert_close(grad, grads[name] * 0.5 / norm, rtol=1e-4, atol=1e-7)


def test_trainer_gives_backbone_and_adapters_their_own_rates_under_one_schedule(example, toy_base, tmp_path):
    trainer, *_ = trained(example, toy_base, tmp_path, max_steps=2, lr_scheduler_type="constant")
    plain = example("plain_pytorch")
    groups = trainer.optimizer.param_groups
    assert [group["lr"] for group in groups] == [plain.BACKBONE_RATE, plain.ADAPTER_RATE]
    assert [len(group["params"]) for group in groups] == [len(part) for part in plain.names(trainer.model)]
