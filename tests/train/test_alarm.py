"""The alarm on made-up records, and on real trainings that deserve it; text health against the model's own logits."""

import json

import pytest
import torch

from spo_ray.config.train import AlarmConfig, TrainConfig
from spo_ray.core.text_metrics import distinct, repetition
from spo_ray.train.alarm import Alarm, describe
from spo_ray.train.callbacks import probe_interval
from spo_ray.train.distributed import Distributed
from spo_ray.train.generation import text_health
from spo_ray.train.logp_eval import Measure

from ..helpers import SMALL
from .processes import log_of, train

FAST = [*SMALL, "preference.epochs=6", "preference.probe_every=2", "preference.health_every=4"]
HARMFUL = [*FAST, "preference.theta.lr=3e-3", "preference.phi.lr=3e-3", "methods.dpo.beta=0.1"]


def probe(step, fell=0.0, both=0.0, **more):
    return {"step": step, "probe/delta_logp_chosen_per_token": -fell, "probe/both_fell": both, **more}


def test_it_sounds_once_for_every_time_that_a_limit_is_passed():
    alarm = Alarm(AlarmConfig(max_fall=1.0, max_both_fell=0.5))
    assert alarm.check(probe(0)) == {}
    assert alarm.check(probe(2, fell=1.0, both=0.5)) == {}
    assert alarm.check(probe(4, fell=1.5, both=0.6)) == {"alarm/chosen": 1.5, "alarm/both_fell": 0.6}
    assert alarm.check({"step": 5}) == {}
    assert alarm.check(probe(6, fell=2.0, both=0.6)) == {}
    assert alarm.check(probe(8, fell=0.5, both=0.6)) == {}
    assert alarm.check(probe(10, fell=1.1, both=0.6)) == {"alarm/chosen": 1.1}
    assert [(entry["step"], entry["alarm"]) for entry in alarm.sounded] == [
        (4, "chosen"),
        (4, "both_fell"),
        (10, "chosen"),
    ]
    again = Alarm(alarm.config)
    again.load_state_dict(json.loads(json.dumps(alarm.state_dict())))
    assert again.check(probe(12, fell=1.2)) == {}
    assert again.sounded == alarm.sounded


@pytest.mark.parametrize(("length", "sounds"), [(20, None), (29, None), (31, 3.1), (4, None), (3, 10 / 3)])
def test_lengths_are_compared_with_the_start(length, sounds):
    alarm = Alarm(AlarmConfig(max_length_ratio=3.0))
    assert alarm.check({"step": 0, "health/length": 10.0, "health/repetition": 0.1}) == {}
    found = alarm.check({"step": 4, "health/length": float(length), "health/repetition": 0.1})
    assert found.get("alarm/length") == (None if sounds is None else pytest.approx(sounds))


@pytest.mark.parametrize(("every", "total", "steps"), [(None, 9, 1), (None, 50, 2), (None, 9000, 200), (7, 9000, 7)])
def test_short_trainings_are_probed_often_enough_for_a_curve(every, total, steps):
    assert probe_interval(every, total) == steps


def test_limits_can_be_taken_away():
    alarm = Alarm(AlarmConfig(max_fall=None, max_repetition=None))
    assert alarm.check(probe(2, fell=9.0, **{"health/repetition": 1.0})) == {}


def test_what_it_says_has_numbers_and_advice():
    config = AlarmConfig(on_alarm="stop")
    record = probe(7, fell=1.25, both=0.75)
    record |= Alarm(config).check(record)
    first, second = describe(record, config)
    assert first == (
        "preferred answers lost 1.25 nats per token (limit 0.05)",
        "lower the learning rate; an SFT term helps too (spo)",
    )
    assert second.text == "both log-probabilities fell in 75% of pairs (limit 50%)"


def test_a_harmful_training_is_stopped(referenced, tmp_path):
    train(1, referenced.path, tmp_path / "stop", [*HARMFUL, "preference.alarm.on_alarm=stop"], "dpo")
    train(1, referenced.path, tmp_path / "warn", HARMFUL, "dpo")
    stopped, warned = (log_of(tmp_path / name) for name in ("stop", "warn"))
    fell = next(r["step"] for r in warned if any(key.startswith("alarm/") for key in r))
    assert 0 < fell < warned[-1]["step"] == warned[-1]["total_steps"]
    assert stopped[-1]["step"] == fell
    assert stopped[-1]["alarm/stop"] == 1.0
    strip = lambda record: {key: value for key, value in record.items() if key != "alarm/stop"}  # noqa: E731
    assert [strip(r) for r in stopped] == warned[: len(stopped)]
    result = json.loads((tmp_path / "stop" / "result.json").read_text())
    card, means = (tmp_path / "stop" / "README.md").read_text(), result["train"]
    assert "- `method`: type dpo, beta 0.1" in card
    assert f"nats | {means['delta_logp_chosen']:.4g} |\n" in card
    assert f"## Data\n\n{means['n']} pairs of toy." in card
    assert str(tmp_path) not in card
    assert result["stopped_at"] == fell
    for entry in result["alarms"]:
        assert entry["value"] == stopped[-1][f"alarm/{entry['alarm']}"]
    if "alarm/chosen" in stopped[-1]:
        assert stopped[-1]["alarm/chosen"] == -stopped[-1]["probe/delta_logp_chosen_per_token"] > 0.05
    # a pair counts where both fell: none can be left out if the means rise
    assert max(r["logps/both_fell"] for r in warned[1:]) > 0.5
    assert warned[1]["logps/both_fell"] == 0.0


def test_a_checkpoint_keeps_the_alarm_as_it_was():
    alarm = Alarm(AlarmConfig(max_fall=1.0))
    state = alarm.state_dict()
    alarm.check(probe(4, fell=2.0))
    assert alarm.sounded
    assert state == Alarm(alarm.config).state_dict()


def test_answers_are_sampled_in_the_compute_type(referenced, tmp_path):
    """A frozen part of the backbone is in bfloat16, the trained one in float32: neither could be called by itself."""
    mixed = ["train.precision=bfloat16", "model.theta={type: last_layers, count: 1}", "preference.epochs=1"]
    train(1, referenced.path, tmp_path / "out", [*FAST, *mixed, "preference.probe_top_tokens=8"], "dpo")
    log = log_of(tmp_path / "out")
    assert all(0.0 < record["health/entropy"] < 5.0 for record in log if "health/entropy" in record)
    assert "health/entropy" in log[0]
    assert "probe/logps/top" in log[0]


def test_text_health_is_that_of_the_models_own_samples(toy_base, referenced, chat):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(toy_base, dtype=torch.float32).eval()
    measure = Measure(model, chat, TrainConfig(), Distributed(0, 1, torch.device("cpu")))
    table = referenced.rows()[:6]
    before = torch.get_rng_state()
    one = text_health(measure, table, 1, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    entropies = []
    for row in table:
        with torch.inference_mode():
            logps = model(input_ids=torch.tensor([row["prompt_ids"]])).logits[0, -1].log_softmax(-1)
        entropies.append(-(logps.exp() * logps).sum().item())
    assert one["health/entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-4)
    assert one["health/length"] == 1.0
    long = text_health(measure, table, 48, seed=0)
    assert long == text_health(measure, table, 48, seed=0)
    assert long != text_health(measure, table, 48, seed=1)
    with torch.no_grad():  # a policy that knows one token alone
        model.lm_head.weight.zero_()
    flat = text_health(measure, table, 48, seed=0)
    assert flat["health/entropy"] == pytest.approx(
        torch.log(torch.tensor(float(model.config.vocab_size))).item(), rel=1e-4
    )
    assert flat["health/distinct_2"] > long["health/distinct_2"]
    assert repetition([1, 2, 3, 4] * 3) == pytest.approx(1 - 4 / 9)
    assert distinct([[1, 1, 1]], 2) == 0.5
