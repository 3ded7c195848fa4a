"""Blocks of code and configuration, links, and names in the documentation."""

import importlib
import json
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from spo_ray.config.base import ConfigModel
from spo_ray.config.load import load
from spo_ray.config.schema import Config
from spo_ray.data.messages import example
from spo_ray.data.preference_formats import preference
from spo_ray.model.load import load_model

from ..conftest import ROOT
from .pages import FENCE, PAGES, blocks, prose_of, text_of

LANGUAGES = {"sh", "python", "yaml", "json"}
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
SECTIONS = "ray|data|model|engine|sampling|sft_data|pairs|train|sft|preference|eval|tracking|sweep"


def test_every_block_has_a_language_that_is_tested():
    for page in PAGES:
        for language, text in FENCE.findall(text_of(page)):
            shown = (page, language) in (("CONTRIBUTING.md", "text"), ("docs/tutorial.md", "text"))  # a map, outputs
            assert language in LANGUAGES or shown, f"{page}: {text[:60]}"
        assert not re.search(r"^    \S*(spo-ray|python|ray) ", prose_of(page), re.MULTILINE), (
            page
        )  # commands in no block


def identify(block):
    return f"{block.page}:{block.text.splitlines()[0]}"


@pytest.fixture
def given(monkeypatch, toy_base):
    """What the blocks take as given: a model with adapters, a batch, and finished runs."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    plain = importlib.import_module("plain_pytorch")
    torch.manual_seed(0)
    model, tokenizer = plain.load(toy_base), AutoTokenizer.from_pretrained(toy_base)
    batch = plain.collate([plain.encode(pair, tokenizer) for pair in plain.PAIRS[:2]])
    batch |= plain.reference(model, batch)
    backbone, adapters = plain.names(model)
    return {"model": model, "batch": batch, "backbone_names": backbone, "adapter_names": adapters}


@pytest.fixture
def run_folder(tmp_path, toy_base):
    """A model's folder and a finished run's, from the toy base."""
    from peft import LoraConfig, get_peft_model

    shutil.copytree(toy_base, tmp_path / "models" / "mine")
    method = tmp_path / "runs" / "mine" / "method_spo"
    for folder in (method, method / "backbone"):
        load_model(toy_base).save_pretrained(folder)
        AutoTokenizer.from_pretrained(toy_base).save_pretrained(folder)
    get_peft_model(load_model(toy_base), LoraConfig(target_modules="all-linear")).save_pretrained(method / "adapter")
    return tmp_path


@pytest.mark.parametrize("block", blocks("python"), ids=identify)
def test_python_runs(block, given, run_folder, monkeypatch):
    monkeypatch.chdir(run_folder)
    before = set(given)
    exec(compile(block.text, block.page, "exec"), given)
    made = {name: value for name, value in given.items() if name not in before and not name.startswith("__")}
    assert any(not isinstance(value, types.ModuleType) for value in made.values())
    if "grads" in made:
        assert set(made["grads"]) == {*given["backbone_names"], *given["adapter_names"]}
        assert all(torch.isfinite(grad).all() for grad in made["grads"].values())
    if "Exact" in made:
        verifier = made["Exact"]()
        assert verifier.accepts("4")
        assert verifier.grade(" 4\n", "4").correct
        assert not verifier.grade("5", "4").correct


@pytest.mark.parametrize("block", blocks("yaml"), ids=identify)
def test_yaml_is_configuration(block, in_root):
    """Parts of a configuration, each in place of the quickstart's."""
    tree = yaml.safe_load(block.text)
    file = "configs/sweeps/toy.yaml" if "sweep" in tree else "configs/quickstart.yaml"
    config = load(file, [f"{key}={json.dumps(value)}" for key, value in tree.items()])
    assert set(tree) <= set(config.model_dump())


@pytest.mark.parametrize("block", blocks("json"), ids=identify)
def test_json_lines_are_preferences_or_sft_rows(block):
    for line in block.text.splitlines():
        row = json.loads(line)
        if "chosen" not in row:
            assert example(row)[0][-1]["role"] == "user"
            continue
        pair = preference(row)
        assert pair.prompt[-1]["role"] == "user"
        assert pair.chosen != pair.rejected


def anchors(page: Path):
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in LINK.findall(prose_of(page)):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        there = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert there.exists(), f"{page}: {target}"
        assert there.is_relative_to(ROOT), f"{page}: {target}"
        assert not anchor or anchor in anchors(there), f"{page}: {target}"


def test_every_page_is_in_the_index_and_in_the_sites_navigation():
    pages = sorted(Path(page).name for page in PAGES if page.startswith("docs/"))
    linked = {target.partition("#")[0] for target in LINK.findall(text_of("docs/README.md"))}
    assert set(pages) - {"README.md"} <= linked
    assert sorted(re.findall(r"[\w-]+\.md", text_of("mkdocs.yml"))) == pages


@pytest.mark.slow
def test_the_site_has_every_page_and_no_dead_link(tmp_path):
    """``--strict`` ends with 1 if a link or an anchor leads nowhere."""
    command = [Path(sys.executable).parent / "uvx", "--from", "mkdocs==1.6.1", "mkdocs", "build", "--strict"]
    subprocess.run([*command, "-d", tmp_path], cwd=ROOT, check=True, capture_output=True, text=True)
    built = {file.parent.name for file in tmp_path.glob("*/index.html")}
    assert {Path(page).stem for page in PAGES if page.startswith("docs/")} - {"README"} <= built


def sections(annotation):
    if isinstance(annotation, type) and issubclass(annotation, ConfigModel):
        yield annotation
    for part in get_args(annotation):
        yield from sections(part)


def has_field(kinds, keys):
    """Whether one of the sections has the field that the keys lead to; a mapping's keys are free."""
    if not keys:
        return True
    for kind in kinds:
        field = kind.model_fields.get(keys[0])
        if field is not None and has_field(list(sections(field.annotation)), keys[1:]):
            return True
    return False


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/configuration.md"])
def test_fields_that_pages_name_exist(page):
    for name in re.findall(rf"`((?:{SECTIONS})\.[a-z_.0-9]+)(?=[`=:])", prose_of(page)):
        is_file = name.endswith((".jsonl", ".parquet"))
        assert is_file or has_field([Config], name.split(".")), f"{page}: {name}"


def test_functions_that_the_map_names_exist():
    page = text_of("docs/mathematics.md")
    names = re.findall(r"`((?:losses|dynamics|spo|batch_gradients|safe_region)\.[\w.]+)`", page)
    assert len(names) > 8
    for module, _, path in (name.partition(".") for name in names):
        if path == "py":
            assert (ROOT / "spo_ray" / "core" / f"{module}.py").exists()
            continue
        found = importlib.import_module(f"spo_ray.core.{module}")
        for part in path.split("."):
            found = getattr(found, part)
