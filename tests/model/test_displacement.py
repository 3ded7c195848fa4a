"""CHES scores against a direct computation on single sequences, and their filter."""

import json

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from spo_ray.data.filter import without_displacement
from spo_ray.data.inspect import inspect_data
from spo_ray.model.displacement import ches_scores
from spo_ray.runtime import schema
from spo_ray.runtime.artifact import Artifact, write_rows
from spo_ray.runtime.run import Run
from spo_ray.train.reference import ReferenceLogps

from ..helpers import small_config

TEXTS = [
    ("2 + 3 = 5.", "2 + 3 = 6."),
    ("It is 5, I think.", "7"),
    ("5", "Who knows? It may be 5, or 55."),
    ("5.", "five"),
]


@pytest.fixture
def rows(chat):
    prompt = chat.prompt_ids("How many are 2 and 3?")
    sides = [[chat.completion_ids(text) for text in pair] for pair in TEXTS]
    return [
        {"id": str(i), "prompt_ids": prompt[i:], "chosen_ids": w, "rejected_ids": losing, "template_differs": False}
        for i, (w, losing) in enumerate(sides)
    ]


def direct(model, row):
    """The formulas of the paper, word for word, from the hidden states before every token of a response."""
    sums = []
    for side in ("chosen_ids", "rejected_ids"):
        ids = torch.tensor([row["prompt_ids"] + row[side]])
        hidden = model(ids, output_hidden_states=True).hidden_states[-1][0].double()
        start = len(row["prompt_ids"]) - 1
        sums.append(torch.stack([hidden[start + k] for k in range(len(row[side]))]))
    (w, n_w), (losing, n_l) = ((part.sum(0), len(part)) for part in sums)
    return (w @ losing - w @ w).item(), (w @ losing / (n_w * n_l) - w @ w / n_w**2).item()


@torch.no_grad()
def test_scores_are_those_of_the_paper(toy_base, chat, rows):
    model = AutoModelForCausalLM.from_pretrained(toy_base, dtype=torch.float32).eval()
    expected = [direct(model, row) for row in rows]
    for at_once in (1, 3, 8):
        found = ches_scores(model, rows, chat.pad_id, at_once)
        assert [tuple(score) for score in found] == [pytest.approx(pair, rel=1e-4) for pair in expected]
    same = [row | {"rejected_ids": row["chosen_ids"]} for row in rows]
    assert [score.ches for score in ches_scores(model, same, chat.pad_id, 8)] == [pytest.approx(0.0, abs=1e-3)] * 4
    mapper = ReferenceLogps(str(toy_base), "float32", 64, with_ches=True)
    (scored, _) = mapper(rows)
    assert [row["ches_per_token"] for row in scored] == [pytest.approx(value, rel=1e-4) for _, value in expected]


def test_the_pairs_with_the_highest_scores_are_dropped(in_root, tmp_path):
    empty = {"prompt_ids": [1], "chosen_ids": [1], "rejected_ids": [1], "template_differs": False}
    logps = {"ref_chosen_logps": -1.0, "ref_rejected_logps": -1.0, "ches": 0.0}
    table = [empty | logps | {"id": str(i), "ches_per_token": float(-i)} for i in range(8)]
    (tmp_path / "reference").mkdir()
    write_rows(tmp_path / "reference" / "part-0.parquet", table, schema.ChesPair)
    pairs = Artifact(tmp_path / "reference", "reference")
    assert without_displacement(Run(small_config(tmp_path)), pairs) is pairs
    kept = without_displacement(
        Run(small_config(tmp_path, "pairs.max_ches_quantile=0.75", "pairs.ches=ches_per_token")), pairs
    )
    assert [row["id"] for row in kept.rows()] == ["2", "3", "4", "5", "6", "7"]
    assert kept.manifest["facts"]["max_ches_per_token"] == -2.0
    rejected = pq.read_table(next(kept.path.glob("rejected*.parquet"))).to_pylist()
    assert {row["reason"] for row in rejected} == {"CHES score above the quantile pairs.max_ches_quantile=0.75"}


def test_inspect_lists_the_worst_pairs(in_root, tmp_path, capsys):
    from rich.console import Console

    file = tmp_path / "pairs.jsonl"
    rows = [json.dumps({"prompt": "2 and 3?", "chosen": chosen, "rejected": rejected}) for chosen, rejected in TEXTS]
    file.write_text("\n".join(rows))
    inspect_data(small_config(tmp_path), file, 2, Console(width=200), displacement=True)
    listed = capsys.readouterr().out.partition("CHES scores")[2]
    scores = [float(line.split()[2]) for line in listed.splitlines() if line.startswith("row ")]
    assert len(scores) == 2
    assert scores == sorted(scores, reverse=True)
    assert "chosen: '" in listed
