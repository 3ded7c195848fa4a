"""The study on real weights: its rows from a finished run, and the tables on the page from the committed rows."""

from collections import Counter
from itertools import chain, pairwise, product
from math import comb

import pytest

from benchmarks import real_weights
from benchmarks.real_weights import BLOCKS, PAGE, RATES, TASKS, blocks, read_rows, rows_of, tables, written
from spo_ray.config.load import load

from .report.made_up import made_up_run

RIGHTS = {"base": 2, "sft": 6, "dpo": 4, "spo": 12}


@pytest.fixture
def rows(in_root, tmp_path):
    return list(rows_of("word_problems", made_up_run(tmp_path, "a", RIGHTS, "methods.dpo.lr=3e-4")))


@pytest.mark.parametrize("task", TASKS)
def test_each_block_is_a_configuration_with_the_methods_of_those_before_it(in_root, tmp_path, task):
    file = f"configs/smollm2/{task}.yaml"
    configs = [load(file, overrides) for overrides in blocks(task, 1, tmp_path)]
    for before, after in pairwise(configs):
        assert before.methods.items() < after.methods.items()
        assert before.model_copy(update={"methods": after.methods}) == after
    rate = configs[0].preference.theta.lr
    assert rate == configs[0].preference.phi.lr == RATES[0]
    rates = Counter((method.type, method.lr or rate) for method in configs[-1].methods.values())
    assert rates == Counter(product(chain(*BLOCKS), RATES))
    assert load(file).methods.items() <= configs[0].methods.items()


def test_a_row_has_what_the_run_measured(rows):
    names = ("method", "lr", "delta_logp_chosen", "right")
    assert [tuple(row.get(name) for name in names) for row in rows] == [
        ("base", None, None, "1" * 2 + "0" * 10),
        ("sft", None, None, "1" * 6 + "0" * 6),
        ("dpo", 3e-4, -2.0, "1" * 4 + "0" * 8),
        ("spo", 3e-4, 1.0, "1" * 12),
    ]


def test_the_tables_have_wilsons_intervals_and_mcnemars_tests_after_holm(rows):
    lines = tables(rows).splitlines()
    low = 12 / (12 + 1.959964**2)  # Wilson's lower end for 12 of 12
    assert f"| spo | 0.0003 | 100.0 ({100 * low:.1f}–100.0) | 100.0 | +1.00 | -4.00 |" in lines
    # only the first is right on 6 and 8 questions; the differences: dpo - sft (2 lost), spo - sft, spo - dpo
    sft, dpo = (2 * comb(n, 0) / 2**n for n in (6, 8))
    tests = [line.split(" | ") for line in lines if "−" in line]
    assert [(cells[0], cells[2].split(" (")[0]) for cells in tests] == [
        ("| dpo − sft", "-16.7"),
        ("| spo − sft", "+50.0"),
        ("| spo − dpo", "+66.7"),
    ]
    assert [cells[3] for cells in tests] == ["0.5 |", f"{2 * sft:.2g} |", f"{3 * dpo:.2g} |"]


def test_rows_of_a_run_are_replaced_and_those_of_others_stay(rows, monkeypatch, tmp_path):
    monkeypatch.setattr(real_weights, "ROWS", tmp_path / "rows.jsonl")
    for task, folder in (("word_problems", "a"), ("word_problems", "a"), ("ultrafeedback", "a")):
        real_weights.add_rows(task, tmp_path / folder)
    assert read_rows() == [*rows, *(row | {"task": "ultrafeedback"} for row in rows)]


def test_the_pages_tables_are_those_of_the_committed_rows():
    page = PAGE.read_text("utf-8")
    assert "| method | learning rate |" in page
    assert written(page, read_rows()) == page
