import pytest

from ..conftest import ROOT
from .made_up import made_up_run, made_up_sweep

RIGHTS = {"base": 2, "sft": 6, "dpo": 4, "spo": 12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs a, b (the same questions) and c (others), and a sweep s."""
    root = tmp_path_factory.mktemp("made-up")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        made_up_run(root, "a", RIGHTS)
        made_up_run(root, "b", RIGHTS | {"dpo": 5, "spo": 1}, "methods.spo.lambda_sft=7", "eval.max_tokens=32")
        made_up_run(root, "c", RIGHTS, seed=5)
        made_up_sweep(root, "s", 11)
    return root
