"""Sharded training in several processes against one process: parameters, logs, checkpoints."""

import math

import pytest
import torch
from safetensors.torch import load_file

from spo_ray.runtime import schema
from spo_ray.runtime.artifact import write_rows

from ..conftest import ROOT
from .processes import log_of, train

BASE = ["preference.epochs=2", "sft.epochs=2", "sft.batch_size=4", "preference.dynamics_every=10"]
RATES = ["preference.theta.lr=1e-4", "preference.phi.lr=1e-4"]
SPO = "methods.spo={{type: spo, base: {{type: dpo, beta: 0.5}}, gamma: {}, inner: {{steps: 2, eta: 1e-3}}}}"
EXACT = SPO.format(0.5).replace("eta: 1e-3", "eta: 1e-3, method: exact")
CASES = {
    "sft": (None, [], 1e-5),
    "dpo": ("dpo", [], 1e-5),
    "spo_exact": ("spo", [EXACT, "preference.epochs=1"], 1e-5),
    "spo_joint": ("spo", ["methods.spo={type: spo, base: {type: dpo, beta: 0.5}, inner: {steps: 0}}"], 1e-5),
    "spo_hinge": ("spo", [SPO.format(0.5), "train.precision=float64"], 1e-8),
}


def difference(one, other):
    """Relative distance of two state dicts."""
    assert one.keys() == other.keys()
    far = sum((one[k].double() - other[k].double()).pow(2).sum() for k in one)
    return math.sqrt(far / sum(v.double().pow(2).sum() for v in one.values()))


def swapped(table):
    """Pairs with chosen and rejected exchanged."""
    sides = {"chosen_ids": "rejected_ids", "ref_chosen_logps": "ref_rejected_logps"}
    return [row | {a: row[b] for a, b in (*sides.items(), *((b, a) for a, b in sides.items()))} for row in table]


@pytest.mark.parametrize("case", CASES)
def test_sharded_workers_take_the_steps_of_one(case, sft_rows, referenced, tmp_path):
    """10 steps and more (5 exact ones) in 1, 2 and 4 processes, with gradients from several backward passes."""
    method, overrides, tolerance = CASES[case]
    table = (sft_rows if method is None else referenced).path
    if hinged := "gamma: 0.5" in "".join(
        overrides
    ):  # it is active where the chosen side has the larger gradient: here after an exchange
        table = tmp_path / "swapped"
        table.mkdir()
        write_rows(table / "part-0.parquet", swapped(referenced.rows()), schema.ReferencedPair)
    overrides = [*BASE, *RATES, *overrides]
    whole = {
        n: train(n, table, tmp_path / str(n), [*overrides, f"train.pairs_per_backward={3 - n // 2}"], method)
        for n in (1, 2, 4)
    }
    logs = {n: log_of(tmp_path / str(n)) for n in whole}
    assert logs[1][-1]["step"] >= (5 if case == "spo_exact" else 10)
    for n in (2, 4):
        assert difference(whole[1], whole[n]) < tolerance
        for one, other in zip(logs[1], logs[n], strict=True):
            assert one.keys() == other.keys()
            for key in one.keys() - {"spo/term_b_error"}:
                assert one[key] == pytest.approx(other[key], rel=2e-3, abs=1e-4), (one["step"], key)
    if hinged:
        assert any(record.get("spo/hinge_active") for record in logs[1])
    moved = difference(
        load_file(ROOT / "assets/toy_base/model.safetensors"), load_file(tmp_path / "1" / "model.safetensors")
    )
    assert moved > 100 * difference(whole[1], whole[2])


def test_whole_copies_take_the_steps_of_one_too(referenced, tmp_path):
    """Without sharding, R is possible pair by pair; five workers leave some without a row in some batches."""
    (tmp_path / "rows").mkdir()
    write_rows(tmp_path / "rows" / "part-0.parquet", swapped(referenced.rows()), schema.ReferencedPair)
    spo = SPO.format("0.5, hinge: pair")
    overrides = ["preference.epochs=1", "train.sharding=none", "train.precision=float64", spo, *RATES]
    whole = {n: train(n, tmp_path / "rows", tmp_path / str(n), overrides, "spo") for n in (1, 5)}
    assert difference(whole[1], whole[5]) < 1e-8


def test_resume_on_one_and_on_four_what_two_have_saved(referenced, tmp_path):
    """The optimizer's states, SPO's running statistics and lambda, and the place in the data go along."""
    method = (
        "methods.spo={type: spo, base: {type: alpha_dpo}, safe_region: {epsilon: 0.01, lr: 1.0}, gamma: 0.1, "
        "inner: {steps: 1, eta: 1e-3}}"
    )
    overrides = [*BASE, *RATES, method]
    whole = train(2, referenced.path, tmp_path / "2", overrides, "spo", write=tmp_path / "saved", at=5)
    for n in (1, 2, 4):
        out = tmp_path / f"from_{n}"
        out.mkdir()
        (out / "log.jsonl").write_text((tmp_path / "2" / "log.jsonl").read_text())
        again = train(n, referenced.path, out, overrides, "spo", read=tmp_path / "saved")
        assert difference(whole, again) < (1e-12 if n == 2 else 1e-5)
        for one, other in zip(log_of(tmp_path / "2"), log_of(out), strict=True):
            for key in one.keys() - {"spo/term_b_error"}:
                assert one[key] == pytest.approx(other[key], rel=2e-3, abs=1e-4), (one["step"], key)


def test_a_step_without_a_finite_gradient_is_skipped(referenced, tmp_path):
    """One of 40 pairs has no reference log-probability; the check before step 0 sees the first 32."""
    table = (referenced.rows() * 2)[:40]
    table = [row | {"id": f"{i:03d}"} for i, row in enumerate(table)]
    table[35]["ref_chosen_logps"] = float("nan")
    (tmp_path / "rows").mkdir()
    write_rows(tmp_path / "rows" / "part-0.parquet", table, schema.ReferencedPair)
    out, overrides = tmp_path / "out", [*RATES, "preference.epochs=2", "preference.probe_pairs=8"]
    whole = train(1, tmp_path / "rows", out, overrides, "dpo")
    log = log_of(out)
    assert [record["skipped_steps"] for record in log if record["step"]].count(0) >= 1
    assert log[-1]["skipped_steps"] == 2
    assert sum(record.get("grad_norm", 0.0) is None for record in log) == 2
    assert all(torch.isfinite(value).all() for value in whole.values())


def test_half_precision_and_offload_and_checkpointed_layers(referenced, tmp_path):
    """bfloat16 shards agree with autocast in one process roughly; the other two change no result."""
    spo = SPO.format(0.0)
    options = {
        "one": ["train.precision=bfloat16"],
        "two": ["train.precision=bfloat16"],
        "two_frugal": ["train.precision=bfloat16", "train.cpu_offload=true", "train.gradient_checkpointing=true"],
    }
    logs = {}
    for name, extra in options.items():
        train(
            1 if name == "one" else 2,
            referenced.path,
            tmp_path / name,
            ["preference.epochs=1", spo, *RATES, *extra],
            "spo",
        )
        logs[name] = log_of(tmp_path / name)
    for one, two, frugal in zip(*logs.values(), strict=True):
        for key in ("loss", "logps/chosen", "grad_norm"):
            if key in one:
                assert two[key] == pytest.approx(one[key], rel=0.05, abs=0.05)
                assert frugal[key] == pytest.approx(two[key], rel=1e-3, abs=1e-3)
