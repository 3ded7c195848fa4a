import json
from pathlib import Path

import pandas as pd
import pytest

from spo_ray.errors import UserError
from spo_ray.evaluate.win_rates import read_annotations, win_rates

MODELS = ["gemma-2b-it", "FuseChat-Llama-3.2-1B-Instruct"]


def record(preference, length=3, **changed):
    sides = {"output_1": "a" * 4, "output_2": "b" * length, "generator_1": "base", "generator_2": "new"}
    return {"instruction": "i", **sides, "preference": preference} | changed


@pytest.mark.parametrize("model", MODELS)
def test_real_annotations_give_the_published_figures(model, shared_data):
    folder = shared_data / "alpaca_eval" / "annotations"
    expected = json.loads((folder / "expected.json").read_text())[model]
    found = win_rates(read_annotations(folder / f"{model}.json"))
    for key in ("win_rate", "standard_error", "discrete_win_rate"):
        assert found[key] == pytest.approx(expected[key], abs=1e-6)
    assert found["length_controlled_win_rate"] == pytest.approx(expected["lc_minimal"], abs=1e-4)
    assert (found["lc_method"], found["n_total"]) == ("length_controlled_minimal", expected["n"])


def test_draws_count_half_and_missing_preferences_are_counted():
    found = win_rates([record(2.0), record(1.0), record(1.5), record(0), record(None)])
    assert (found["win_rate"], found["n_total"], found["unjudged"]) == (50.0, 4, 1)
    assert found["length_controlled_win_rate"] is None  # too few
    with pytest.raises(UserError, match="nothing was judged"):
        win_rates([record(None)])


def test_length_control_takes_out_an_advantage_of_length():
    """The judge likes the longer output, and nothing else."""
    lengths = [1, 2, 3, 6, 7, 20] * 20
    found = win_rates([record(1.9 if n > 4 else 1.1, n) for n in lengths])
    assert found["win_rate"] == pytest.approx(50.0)
    shorter = [record(1.9 if n > 4 else 1.1, n) for n in lengths if n != 20]
    assert win_rates(shorter)["win_rate"] < win_rates(shorter)["length_controlled_win_rate"]
    assert win_rates([record(2.0)] * 20)["length_controlled_win_rate"] is None  # all as long as each other


def test_the_leaderboards_formula_with_a_table_in_place_of_the_hubs(tmp_path, monkeypatch):
    """The hub is not to be had in tests: its table is made up, the fit is AlpacaEval's own."""
    count = 40
    rows = [
        {
            "model": m,
            "index": i,
            "instruction_difficulty": 2.0 if i % 3 else -2.0,
            "preference": 0.5,
            "std_delta_len": d,
        }
        for m, d in (("short", -1.0), ("long", 1.0))
        for i in range(count)
    ]
    table = tmp_path / "df_gamed.csv"
    pd.DataFrame(rows).assign(not_gamed_baseline=False).to_csv(table, index=False)
    monkeypatch.setattr("spo_ray.evaluate.win_rates._table_within_reach", lambda: True)
    monkeypatch.setattr("alpaca_eval.metrics.glm_winrate.hf_hub_download", lambda **name: str(table))
    records = [record(1.9 if i % 3 else 1.1, 2 + i % 7 + 4 * bool(i % 3)) for i in range(count)]
    v1, minimal = win_rates(records, "v1"), win_rates(records, "minimal")
    assert (v1["lc_method"], minimal["lc_method"]) == ("length_controlled_v1", "length_controlled_minimal")
    assert v1["length_controlled_win_rate"] != pytest.approx(minimal["length_controlled_win_rate"], abs=0.1)


def test_without_the_hub_v1_becomes_minimal_and_says_so(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    records = [record(1.2 + 0.1 * (i % 5), 1 + i % 4) for i in range(20)]
    assert win_rates(records, "v1") == win_rates(records, "minimal")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"),
        ("{}", "must hold a list"),
        ("[]", "must hold a list"),
        ("[3]", "record 0 has no 'instruction'"),
        (json.dumps([record(1.0), {"instruction": "i"}]), "record 1 has no 'output_1'"),
        (json.dumps([record(3.0)]), "preference is 3.0, neither 0"),
        (json.dumps([record("m")]), "preference is 'm', no number"),
        (json.dumps([record(1.0, output_1=None)]), "must be text"),
        (json.dumps([record(1.0), record(1.0, generator_2="other")]), "generator_2 must be the same"),
    ],
)
def test_bad_files_are_refused(content, message, tmp_path):
    file = tmp_path / "annotations.json"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        read_annotations(file)
    with pytest.raises(UserError, match="can't be read"):
        read_annotations(Path(tmp_path / "absent.json"))
