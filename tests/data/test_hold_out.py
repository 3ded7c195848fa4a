"""What a sweep keeps out of training."""

import pytest

from spo_ray.data.filter import hold_out
from spo_ray.errors import UserError
from spo_ray.runtime import schema
from spo_ray.runtime.artifact import Artifact, write_rows
from spo_ray.runtime.run import Run

from ..helpers import small_config

PAIRS = [("a", "p"), ("b", "p"), ("c", "q"), ("d", "r"), ("e", "q"), ("f", "s")]


def test_all_pairs_of_a_prompt_are_on_the_same_side(in_root, tmp_path):
    table = [
        {
            "id": number,
            "prompt": [{"role": "user", "content": text}],
            "chosen": "x",
            "rejected": "y",
            "source_id": number,
            "chosen_source": "data",
            "rejected_source": "data",
        }
        for number, text in PAIRS
    ]
    (tmp_path / "source").mkdir()
    write_rows(tmp_path / "source" / "part-0.parquet", table, schema.Pair)
    source, seen = Artifact(tmp_path / "source", "source"), set()
    for seed in range(8):
        run = Run(small_config(tmp_path, f"seed={seed}", f"name=run{seed}"))
        parts = hold_out(run, source, "pairs", 2, schema.Pair)
        sides = [{(row["id"], row["prompt"][0]["content"]) for row in part.rows()} for part in parts]
        assert sides[0] | sides[1] == set(PAIRS)
        rows = [part.manifest["rows"] for part in parts]
        assert [row["read"] for row in rows] == [row["kept"] for row in rows] == [len(side) for side in sides]
        prompts = [{prompt for _, prompt in side} for side in sides]
        assert not prompts[0] & prompts[1]
        assert len(prompts[1]) == 2
        seen.add(frozenset(prompts[1]))
    assert len(seen) > 1
    with pytest.raises(UserError, match=r"sweep\.validation\.pairs=4 leaves none of 4"):
        hold_out(Run(small_config(tmp_path)), source, "pairs", 4, schema.Pair)
