"""Pairs that training tests share."""

import random

import pytest

from spo_ray.runtime import schema
from spo_ray.runtime.artifact import Artifact, write_rows

COUNT = 21  # in batches of 4, ranks get unequal shares


@pytest.fixture(scope="session")
def pairs(chat, tmp_path_factory):
    """Tokenised pairs without reference log-probabilities."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = random.Random(0)
    table = []
    for i in range(COUNT):
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
    from spo_ray.train.reference import ReferenceLogps

    table, _ = ReferenceLogps(str(model), "float32", 1024)(pairs)
    write_rows(folder / "part-0.parquet", table, schema.ReferencedPair)
    return Artifact(folder, "referenced")
