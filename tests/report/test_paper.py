"""The paper's tables and figures from made-up runs, with the numbers of the paper's section 4.2.1 beside them."""

from pathlib import Path

import pytest

from pipelines.paper_figures import results_command

from .made_up import made_up_run

RIGHTS = {"base": 2, "sft": 6, "dpo": 3, "dpo_nll": 9, "spo": 12}


def test_a_run_in_the_papers_layout(in_root, folder, tmp_path):
    made_up_run(tmp_path, "a", RIGHTS)
    assert results_command(tmp_path / "a", folder / "s", out=tmp_path / "paper") == 0
    files = {file.name: file.read_text() for file in (tmp_path / "paper").iterdir()}
    assert set(files) == {"a-tables.md", "a-figure-3.svg", "a-figure-4.svg", "s-figure-5.svg"}
    lines = files["a-tables.md"].splitlines()
    assert lines[0] == "Accuracy at temperature 0.7, mean and standard deviation over 2 seeds."
    assert lines[2].count(", paper, not reproduced here") == 2
    assert [line.removeprefix("| assets/toy_base ") for line in lines[4:]] == [
        "| Base Model | 16.7 ± 0.0 | 36.3 | 5.1 |",
        "| SFT | 50.0 ± 0.0 | 44.3 | 50.5 |",
        "| SFT + Vanilla DPO | 25.0 ± 0.0 | 35.4 | 49.6 |",
        "| SFT + SPO | 100.0 ± 0.0 | 49.3 | 54.4 |",
    ]
    assert files["a-figure-3.svg"].count('aria-roledescription="bar"') == 3
    assert all(title in files["a-figure-4.svg"] for title in (">SPO<", ">DPO<", "rejected"))
    assert ">lambda_sft<" in files["s-figure-5.svg"]


def test_without_sft_the_reference_is_the_papers_base_model(in_root, tmp_path):
    made_up_run(tmp_path, "a", {"reference": 6, "dpo": 3, "spo": 12}, "sft=null")
    assert results_command(tmp_path / "a", out=tmp_path) == 0
    lines = (tmp_path / "a-tables.md").read_text().splitlines()[4:]
    assert [line.split(" | ")[1:3] for line in lines] == [
        ["Base Model", "50.0 ± 0.0"],
        ["Vanilla DPO", "25.0 ± 0.0"],
        ["SPO", "100.0 ± 0.0"],
    ]


@pytest.mark.parametrize(("folders", "words"), [((), "name the folders"), ((Path("nowhere"),), "no folder nowhere")])
def test_what_is_no_finished_run_is_one_error(capsys, folders, words):
    assert results_command(*folders) == 2
    assert words in capsys.readouterr().err
