import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = {
    "core": {"ray", "vllm", "transformers", "peft", "pydantic", "spo_ray.config"},
    "model": {"ray", "vllm"},
}


@pytest.mark.parametrize("layer", FORBIDDEN)
def test_lower_layers_stay_free_of_higher_ones(layer):
    files = sorted((ROOT / "spo_ray" / layer).glob("*.py"))
    modules = [f"spo_ray.{layer}.{f.stem}" for f in files if f.stem != "__init__"]
    code = f"import sys, {', '.join(modules)}; print(sorted(set({sorted(FORBIDDEN[layer])}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_data_and_train_never_import_each_other():
    for here, there in (("data", "train"), ("train", "data")):
        for file in (ROOT / "spo_ray" / here).glob("*.py"):
            assert f"spo_ray.{there}" not in file.read_text(), f"{file} imports {there}"


def test_core_offers_its_names_without_importing_torch_for_scoring():
    code = "import sys, spo_ray.core, spo_ray.core.scoring, spo_ray.core.stats, spo_ray.core.pairs\n"
    code += "assert 'torch' not in sys.modules\n"
    code += "from spo_ray.core import *\nfrom spo_ray.core.spo import spo_gradients as direct\n"
    code += "print(spo_gradients is direct, callable(dpo), callable(completion_logps))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == ["True"] * 3
