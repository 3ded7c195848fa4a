"""The study on real weights: its rows from a finished run, and the tables on the page from the committed rows."""

import json
from collections import Counter
from itertools import pairwise, product
from math import comb

import pytest

from benchmarks import real_weights
from benchmarks.real_weights import PAGE, RATES, TASKS, blocks, overrides_of, read_rows, rows_of, tables, written
from spo_ray.config.load import load

from .report.made_up import made_up_run

RIGHTS = {"base": 2, "sft": 6, "dpo": 4, "spo": 12}


@pytest.fixture
def rows(in_root, tmp_path):
    return list(rows_of("word_problems", made_up_run(tmp_path, "a", RIGHTS, "methods.dpo.lr=3e-4")))


@pytest.fixture
def search(monkeypatch, tmp_path):
    """Results of a search in which DPO is best at 3e-6, SPO at 1e-5, and one trial failed."""
    scores = [("dpo", 3e-6, 0.5, 0.4), ("dpo", 1e-5, 0.6, 0.2), ("spo", 3e-6, 0.1, 0.1), ("spo", 1e-5, 0.3, 0.2)]
    lines = ["trial,methods.tried.type,methods.tried.lr,accuracy_greedy,accuracy_sampled"]
    lines += [",".join(map(str, (i, *line))) for i, line in enumerate(scores)] + ["4,spo,3e-05,,"]
    file = tmp_path / "search.csv"
    file.write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setattr(real_weights, "SEARCHED", file)


@pytest.mark.parametrize("task", TASKS)
def test_each_block_is_the_tasks_configuration_with_methods_of_its_own(in_root, tmp_path, task, search):
    file = f"configs/smollm2/{task}.yaml"
    configs = [load(file, overrides_of(task, 1, block, tmp_path)) for block in blocks()]
    for before, after in pairwise(configs):
        assert before.model_copy(update={"methods": after.methods}) == after
    rate = configs[0].preference.theta.lr
    assert rate == configs[0].preference.phi.lr == RATES[0]
    methods = [(name, method) for config in configs for name, method in config.methods.items()]
    assert len({name for name, _ in methods}) == len(methods)
    rates = Counter((method.type, method.lr or rate) for _, method in methods)
    each = {"nll": 1, "dpo": 1, "dpo_nll": 2, "simpo": 1, "spo": 2, "dpop": 1, "ipo": 1}
    expected = Counter({(kind, lr): count for kind, count in each.items() for lr in RATES} | {("dpo", 3e-6): 1})
    expected += Counter({("alpha_dpo", rate): 1, ("spo", rate): 3})
    assert rates == expected
    assert load(file).methods.items() <= configs[0].methods.items()


def test_methods_are_compared_at_their_best_rates_too(rows, search):
    def at(row, lr):
        return row | {"lr": lr}

    base, sft, dpo, spo = rows
    tests = tables([base, sft, at(dpo, 1e-5), at(dpo, 3e-6), at(spo, 1e-5)])
    compared = [line.split(" | ")[:2] for line in tests.splitlines() if line.startswith("| spo − dpo")]
    assert compared == [["| spo − dpo", "1e-05, 3e-06"], ["| spo − dpo", "1e-05"]]
    assert "| dpo | 45 | 40 |" in tests and "| spo | 10 | 25 |" in tests


def test_spo_around_another_loss_is_a_method_of_its_own_and_compared_with_that_loss(in_root, tmp_path):
    overrides = ("methods.dpo={type: simpo}", "methods.spo.base={type: simpo}", "methods.spo.safe_region={}")
    base, sft, simpo, spo = rows_of("word_problems", made_up_run(tmp_path, "a", RIGHTS, *overrides))
    assert (simpo["method"], spo["method"]) == ("simpo", "spo around simpo, safe region")
    text = tables([base, sft, simpo, spo | {"method": "spo around simpo"}])
    compared = [line.split(" | ")[0] for line in text.splitlines() if "−" in line]
    assert compared == ["| simpo − sft", "| spo around simpo − sft", "| spo around simpo − simpo"]


def test_a_row_has_what_the_run_measured(rows):
    names = ("method", "lr", "delta_logp_chosen", "right")
    assert [tuple(row.get(name) for name in names) for row in rows] == [
        ("base", None, None, "1" * 2 + "0" * 10),
        ("sft", None, None, "1" * 6 + "0" * 6),
        ("dpo", 3e-4, -2.0, "1" * 4 + "0" * 8),
        ("spo", 3e-4, 1.0, "1" * 12),
    ]


def test_one_seed_is_tested_by_mcnemars_test_after_holm(rows):
    # only the first is right on 6 and 8 questions; the differences: dpo - sft (2 lost), spo - sft, spo - dpo
    sft, dpo = (2 * comb(n, 0) / 2**n for n in (6, 8))
    tests = [line.split(" | ") for line in tables(rows).splitlines() if "−" in line]
    assert [(cells[0], cells[2], cells[3].split(" (")[0]) for cells in tests] == [
        ("| dpo − sft", "0", "-16.7"),
        ("| spo − sft", "0", "+50.0"),
        ("| spo − dpo", "0", "+66.7"),
    ]
    assert [cells[4] for cells in tests] == ["0.5 |", f"{2 * sft:.2g} |", f"{3 * dpo:.2g} |"]


def test_seeds_are_joined_by_the_mean_of_each_question(rows):
    second = [row | {"seed": 1} for row in rows]
    second[-1] |= {"right": "0" * 6 + "1" * 6, "delta_logp_chosen": -0.5, "accuracy_greedy": {"value": 0.5}}
    lines = [line.split(" | ") for line in tables([*rows, *second]).splitlines()]
    assert "seeds 0, 1: " in tables([rows[2] | {"lr": 1e-6}, *rows, *second])  # though fewer have the smallest rate
    spo = next(cells for cells in lines if cells[0] == "| spo")
    assert spo[2].startswith("75.0 (") and spo[3:6] == ["100 / 50", "100 / 100", "+1.00 / -0.50"]
    low, high = (float(end) for end in spo[2].removeprefix("75.0 (").removesuffix(")").split("–"))
    normal = 100 * 1.96 * 0.25 / 12**0.5  # a half of the questions has 0.5, the other 1
    assert (75 - low, high - 75) == pytest.approx((normal, normal), abs=3)
    (test,) = (cells for cells in lines if cells[0] == "| spo − sft")
    # six questions have 1 - 0.5 less than sft's 1, and six 1 more than its 0: signs of 12 swapped, 4,096 ways
    values = [-0.5] * 6 + [1.0] * 6
    ways = [abs(sum(s * v for s, v in zip(signs, values, strict=True))) for signs in product((1, -1), repeat=12)]
    p_value = sum(way >= sum(values) for way in ways) / len(ways)
    assert test[2:4] == ["0, 1", "+25.0 " + test[3].partition(" ")[2]]
    assert float(test[4].removesuffix(" |")) == pytest.approx(2 * p_value, rel=0.1)


def test_rows_join_those_of_trainings_from_the_same_start(rows, monkeypatch, tmp_path):
    monkeypatch.setattr(real_weights, "ROWS", tmp_path / "rows.jsonl")
    for task in ("word_problems", "word_problems", "ultrafeedback"):
        real_weights.add_rows(task, tmp_path / "a")
    others = [row | {"task": "ultrafeedback"} for row in rows]
    assert read_rows() == [*rows, *others]
    started = [row | {"right": "0" * 12} if row["method"] == "sft" else row | {"lr": 1.0} for row in rows]
    real_weights.ROWS.write_text("".join(f"{json.dumps(row)}\n" for row in started), encoding="utf-8")
    with pytest.raises(SystemExit, match="sft gives other answers"):
        real_weights.add_rows("word_problems", tmp_path / "a")


def test_the_pages_tables_are_those_of_the_committed_rows():
    page = PAGE.read_text("utf-8")
    assert "| method | learning rate |" in page
    assert written(page, read_rows()) == page
