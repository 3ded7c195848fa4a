import json
from collections import Counter
from itertools import pairwise
from statistics import fmean

import pyarrow.parquet as pq
import pytest
import torch

from spo_ray.runtime import schema
from spo_ray.runtime.artifact import external, write_rows
from spo_ray.runtime.run import Run
from spo_ray.train.data_loader import epoch_batches
from spo_ray.train.launch import train_methods, train_sft
from spo_ray.train.reference import reference_logps
from spo_ray.train.spec import Start

from ..helpers import SMALL, small_config
from .processes import log_of, train


def train_all(run, model, table, held_out=None):
    """Every configured method on the same pairs."""
    return train_methods(run, dict.fromkeys(run.config.methods, Start(model, table)), held_out)


@pytest.mark.parametrize(("count", "size"), [(207, 4), (10, 3), (8, 4), (3, 8)])
def test_every_row_once_an_epoch_in_even_batches(count, size):
    batches = list(epoch_batches(count, size, epochs=3, seed=1))
    per_epoch = len(batches) // 3
    for epoch in range(3):
        part = batches[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert Counter(i for batch in part for i in batch) == Counter(range(count))
        assert max(map(len, part)) <= size
        assert max(map(len, part)) - min(map(len, part)) <= 1
    assert batches[:per_epoch] != batches[per_epoch : 2 * per_epoch]
    assert batches == list(epoch_batches(count, size, epochs=3, seed=1))


def test_results_say_what_happened_to_the_training_pairs(local_ray, in_root, toy_base, pairs, tmp_path):
    rates = ["preference.theta.lr=1e-4", "preference.phi.lr=1e-4"]
    run = Run(small_config(tmp_path, *rates, "pairs.max_ches_quantile=1"))
    base = external(toy_base)
    referenced = reference_logps(run, "reference", base, pairs)
    reference = {r["id"]: (r["ref_chosen_logps"], r["ref_rejected_logps"]) for r in referenced.rows()}
    methods = train_all(run, base, referenced, held_out=referenced)
    for name, artifact in methods.items():
        result = json.loads((artifact.path / "result.json").read_text())
        log = [json.loads(line) for line in (artifact.path / "log.jsonl").read_text().splitlines()]
        assert [record["step"] for record in log] == list(range(7))
        start = sum(w for w, _ in reference.values()) / len(reference)
        assert log[0]["probe/logps/chosen"] == pytest.approx(start, abs=1e-3)
        assert log[0]["probe/delta_logp_chosen"] == pytest.approx(0.0, abs=1e-3)
        after = trained_logps(artifact, pairs)
        changes = pq.read_table(artifact.path / "pairs.parquet").to_pylist()
        for side, index in (("chosen", 0), ("rejected", 1)):
            expected = {key: after[key][index] - reference[key][index] for key in reference}
            assert {row["id"]: row[f"delta_logp_{side}"] for row in changes} == pytest.approx(expected, abs=1e-3)
            assert result["train"][f"delta_logp_{side}"] == pytest.approx(fmean(expected.values()), abs=1e-3)
        assert {row["id"]: row["ches"] for row in changes} == {row["id"]: row["ches"] for row in referenced.rows()}
        assert result["held_out"] == pytest.approx(result["train"])
        if name == "dpo":
            assert log[1]["loss"] == pytest.approx(0.6931, abs=1e-3)


def test_the_best_checkpoint_is_exported_if_so_configured(local_ray, in_root, toy_base, referenced, sft_rows, tmp_path):
    config = small_config(
        tmp_path,
        "preference.epochs=3",
        "preference.probe_every=2",
        "preference.theta.lr=3e-3",
        "preference.phi.lr=3e-3",
        "train.checkpoint={every: 2, keep: 1, best: {metric: probe/logps/chosen, mode: max}}",
    )
    run = Run(config.model_copy(update={"methods": {"dpo": config.methods["dpo"]}}))
    sft = train_sft(run, external(toy_base), sft_rows)  # of which the last is taken: it has no such metric
    assert "exported_step" not in json.loads((sft.path / "result.json").read_text())
    artifact = train_all(run, external(toy_base), referenced)["dpo"]
    measured = {
        r["step"]: r["probe/logps/chosen"] for r in steps_of(artifact) if r["step"] and "probe/logps/chosen" in r
    }
    best = max(measured, key=lambda step: measured[step])
    assert best != max(measured), "the last is the best: the test shows nothing"
    result = json.loads((artifact.path / "result.json").read_text())
    assert result["exported_step"] == best
    assert result["train"]["logps/chosen"] == pytest.approx(measured[best], abs=1e-4)
    trained = fmean(chosen for chosen, _ in trained_logps(artifact, referenced).values())
    assert trained == pytest.approx(measured[best], abs=1e-3)


def own_answer_logps(path, pairs, tokens):
    """Mean log-probability of a model's greedy answers that are not the chosen ones, one token at a time."""
    from transformers import AutoModelForCausalLM

    from spo_ray.model.tokenizer import ChatTokenizer

    stops = ChatTokenizer.load(path).stop_ids
    model, values = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), []
    for row in pairs.rows():
        answer, logp = [], 0.0
        while len(answer) < tokens and not (answer and answer[-1] in stops):
            with torch.inference_mode():
                logps = model(input_ids=torch.tensor([row["prompt_ids"] + answer])).logits[0, -1].log_softmax(-1)
            answer.append(int(logps.argmax()))
            logp += logps.max().item()
        if answer != row["chosen_ids"]:
            values.append(logp)
    return sum(values) / len(values)


def trained_logps(artifact, pairs):
    """Log-probabilities of each pair's sides under the exported checkpoint, computed apart from the trainer."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(artifact.path, dtype=torch.float32).eval()
    found = {}
    for row in pairs.rows():
        for side in ("chosen_ids", "rejected_ids"):
            ids = torch.tensor([row["prompt_ids"] + row[side]])
            with torch.inference_mode():
                logps = torch.log_softmax(model(input_ids=ids).logits[0, :-1].double(), -1)
            first = len(row["prompt_ids"]) - 1
            logp = logps[range(first, ids.shape[1] - 1), ids[0, first + 1 :]].sum().item()
            found.setdefault(row["id"], []).append(logp)
    return found


def test_reference_log_probabilities_of_another_model_are_refused(referenced, tmp_path):
    table = [row | {"ref_chosen_logps": row["ref_chosen_logps"] - 1.0} for row in referenced.rows()]
    (tmp_path / "shifted").mkdir()
    write_rows(tmp_path / "shifted" / "part-0.parquet", table, schema.ReferencedPair)
    with pytest.raises(Exception, match="differs from the stored reference"):
        train(1, tmp_path / "shifted", tmp_path / "out", SMALL, "dpo")


def steps_of(artifact):
    return [json.loads(line) for line in (artifact.path / "log.jsonl").read_text().splitlines()]


def test_dynamics_forecast_what_happens_and_the_safe_region_moves_lambda(toy_base, referenced, tmp_path):
    overrides = [
        *SMALL,
        "preference.theta.lr=1e-6",
        "preference.phi.lr=1e-6",
        "preference.dynamics_every=2",
        "preference.probe_top_tokens=24",
        "preference.theta.max_grad_norm=1000",
        "preference.theta.warmup_ratio=0",
        "preference.phi.max_grad_norm=1000",
        "preference.phi.warmup_ratio=0",
        "train.gradient_checkpointing=true",
        "train.pairs_per_backward=3",
        "methods.spo.safe_region={epsilon: 0.01, lr: 10}",
    ]
    for name in ("dpo", "spo"):
        train(1, referenced.path, tmp_path / name, overrides, name)
    log = log_of(tmp_path / "spo")
    for record in log[1:]:
        assert ("dynamics/forecast_chosen" in record) == (record["step"] % 2 == 1)
    for record in log[1::2]:
        for side in ("chosen", "rejected"):
            forecast, realised = record[f"dynamics/forecast_{side}"], record[f"dynamics/realised_{side}"]
            assert forecast == pytest.approx(realised, rel=0.1, abs=1e-4)
        assert record["dynamics/realised_chosen"] > 1e-4
        norms = record["dynamics/norm_chosen"], record["dynamics/norm_rejected"]
        assert record["dynamics/R"] == pytest.approx(max(0.0, norms[0] - norms[1]), rel=1e-6)
    for a, b in pairwise(log[1:]):
        expected = max(1e-3, a["spo/lambda"] + 10 * (a["spo/gap"] - 0.01))
        assert b["spo/lambda"] == pytest.approx(expected, rel=1e-6)
        assert a["spo/gap"] == pytest.approx(-a["logps/chosen_change"])
    tops = [record["probe/logps/top"] for record in log if "probe/logps/top" in record]
    assert tops[0] == pytest.approx(own_answer_logps(toy_base, referenced, 24), abs=1e-3)
    assert len(tops) > 1
    state = json.loads((tmp_path / "spo" / "result.json").read_text())["method_state"]
    assert state["dual"]["value"] == pytest.approx(max(1e-3, log[-1]["spo/lambda"] + 10 * (log[-1]["spo/gap"] - 0.01)))
    assert "spo/lambda" not in log_of(tmp_path / "dpo")[1]


def test_a_method_may_have_a_rate_of_its_own(referenced, tmp_path):
    for name, overrides in {"shared": [], "own": ["methods.dpo.lr=1e-6"]}.items():
        train(1, referenced.path, tmp_path / name, [*SMALL, "preference.theta.lr=1e-4", *overrides], "dpo")
    shared, own = (log_of(tmp_path / name)[3] for name in ("shared", "own"))
    assert own["learning_rate/theta"] == own["learning_rate/phi"] == pytest.approx(shared["learning_rate/theta"] / 100)
