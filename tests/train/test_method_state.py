import json
from typing import get_args

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from spo_ray.config.methods import Base, MethodConfig
from spo_ray.core.running_statistics import RunningStatistics
from spo_ray.core.spo import spo_gradients
from spo_ray.train.method_state import Method, lower_level_notices

from ..core.tiny import relative_error, swapped, tiny_batch, tiny_model

PLAIN = {
    "nll": {"sft_reduction": "token_mean"},
    "dpo": {"beta": 0.9},
    "cdpo": {"beta": 0.9, "label_smoothing": 0.3},
    "robust_dpo": {"beta": 0.9, "label_smoothing": 0.3},
    "ipo": {"beta": 0.9, "ipo_reduction": "sum"},
    "simpo": {"beta": 0.9, "margin": 0.2},
    "alpha_dpo": {"beta": 0.9, "margin": 0.2, "alpha": 0.1},
    "dpop": {"beta": 0.9, "penalty": 1.0},
    "dpo_shift": {"beta": 0.9, "shift": 0.5},
    "cal_dpo": {"beta": 0.9},
    "apo_zero": {"beta": 0.9},
    "apo_down": {"beta": 0.9},
    "nca": {"beta": 0.9},
    "exo_pair": {"beta": 0.9, "label_smoothing": 0.2},
    "slic": {"beta": 0.9},
    "odpo": {"beta": 0.9, "alpha": 0.3, "scaling": "linear"},
    "rpo": {"beta": 0.9, "eta": 0.3},
    "cpo": {"beta": 0.9, "mu": 0.3, "sft_reduction": "sum"},
    "orpo": {"beta": 0.9, "mu": 0.3, "sft_reduction": "sum"},
    "dpo_nll": {"beta": 0.9, "mu": 0.3, "sft_reduction": "token_mean"},
}
SPO = {
    "lambda_sft": 2.0,
    "gamma": 0.1,
    "inner": {"steps": 3},
    "sft_reduction": "token_mean",
    "norm_scope": "adapters",
    "norm_of": "mean",
    "hinge": "pair",
}
INNER = [{"eta": 0.2}, {"every": 3}, {"method": "difference"}]


def method(**fields):
    return Method(TypeAdapter(MethodConfig).validate_python(fields))


def gradient(made, dtype=torch.float64):
    """For pairs whose hinge is active."""
    torch.manual_seed(0)
    model, backbone, adapters = tiny_model(dtype=dtype)
    totals = []
    for batch in (tiny_batch(), swapped(tiny_batch())):
        grads, metrics = spo_gradients(model, batch, backbone=backbone, adapters=adapters, **made.arguments)
        totals += list(grads.values())
    return totals, metrics


@pytest.mark.parametrize(("name", "field"), [(n, f) for n, fields in PLAIN.items() for f in fields])
def test_every_field_of_a_method_changes_its_gradient(name, field):
    usual, _ = gradient(method(type=name))
    other, _ = gradient(method(type=name, **{field: PLAIN[name][field]}))
    assert relative_error(other, usual) > 1e-4


@pytest.mark.parametrize("name", [loss.model_fields["type"].annotation.__args__[0] for loss in get_args(Base)])
def test_spo_wraps_every_base_with_its_fields(name):
    alone, _ = gradient(method(type=name, **PLAIN[name]))
    wrapped, _ = gradient(method(type="spo", base={"type": name} | PLAIN[name], lambda_sft=0.0))
    assert relative_error(wrapped, alone) < 1e-9
    stabilised, _ = gradient(method(type="spo", base={"type": name} | PLAIN[name]))
    assert relative_error(stabilised, alone) > 1e-4


@pytest.mark.parametrize("field", SPO)
def test_every_field_of_spo_changes_its_gradient(field):
    base = {"type": "spo", "gamma": 1.0, "inner": {"steps": 1, "eta": 0.1}}
    usual, _ = gradient(method(**base))
    value = base["inner"] | SPO[field] if field == "inner" else SPO[field]
    other, _ = gradient(method(**base | {field: value}))
    assert relative_error(other, usual) > 1e-10


@pytest.mark.parametrize("change", INNER)
def test_every_field_of_the_lower_level_changes_the_gradient(change):
    inner = {"steps": 1, "eta": 1e-4}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        usual, _ = gradient(method(type="spo", inner=inner), torch.float32)
        other, _ = gradient(method(type="spo", inner=inner | change), torch.float32)
    assert relative_error(other, usual) > 1e-7


def test_alpha_dpo_remembers_between_steps():
    made = method(type="alpha_dpo")
    assert type(made.statistics) is RunningStatistics
    first, _ = gradient(made)
    again, _ = gradient(made)
    assert relative_error(again, first) > 1e-4
    assert type(method(type="spo", base={"type": "alpha_dpo"}).statistics) is RunningStatistics
    assert method(type="dpo").statistics is None


def test_the_safe_region_moves_lambda_by_the_chosen_gap():
    region = {"epsilon": 0.5, "lr": 0.2, "max_lambda": 1.5}
    made = method(type="spo", safe_region=region)
    assert made.after_step({"logps/chosen_change": -2.0}) == {"spo/lambda": 1.0, "spo/gap": 2.0}
    assert made.arguments["lambda_sft"] == pytest.approx(1.3)
    made.after_step({"logps/chosen_change": -9.0})
    assert made.arguments["lambda_sft"] == 1.5
    made.after_step({"logps/chosen_change": 1.0})
    assert made.arguments["lambda_sft"] == pytest.approx(1.2)
    inner = method(type="spo", safe_region=region | {"gap": "inner"}, inner={"eta": 1e-2})
    _, metrics = gradient(inner)
    assert inner.after_step(metrics)["spo/gap"] == metrics["spo/inner_gap"] > 0.5
    assert inner.arguments["lambda_sft"] > 1.0
    assert method(type="spo").after_step({"logps/chosen_change": -2.0}) == {}


def test_term_b_is_in_one_step_of_m_with_its_weight():
    made = method(type="spo", inner={"every": 3, "steps": 2})
    assert [made.at(step)["inner_steps"] for step in range(1, 8)] == [2, 0, 0, 2, 0, 0, 2]
    assert made.at(1)["term_b_weight"] == 3
    with pytest.raises(ValidationError, match=r"inner\.every must be 1"):
        method(type="spo", inner={"every": 3}, safe_region={"gap": "inner"})


@pytest.mark.parametrize(
    ("share", "size", "said"),
    [
        (0.25, 0.5, {"far": "the inner step lowers L_SFT by 25%"}),
        (2e-6, 1e-3, {"nothing": "the inner step lowers L_SFT by only 2e-06 of it"}),
        (0.05, 2.5, {"heavy": "term (b) is 2.5 times term (a)"}),
        (0.05, 0.5, {}),
    ],
)
def test_people_hear_of_a_lower_level_that_moves_far_or_not_at_all(share, size, said):
    found = lower_level_notices({"spo/inner_gap_share": share, "spo/term_b_over_a": size})
    assert found.keys() == said.keys()
    assert all(found[kind].startswith(text) for kind, text in said.items())
    assert lower_level_notices({"loss": 0.5}) == {}


def test_a_method_continues_from_its_state():
    fields = {"type": "spo", "base": {"type": "alpha_dpo"}, "safe_region": {"lr": 0.2}}
    one = method(**fields)
    gradient(one)
    one.after_step({"logps/chosen_change": -2.0})
    other = method(**fields)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other.arguments["lambda_sft"] == one.arguments["lambda_sft"] != 1.0
    assert relative_error(gradient(other)[0], gradient(one)[0]) == 0
    assert method(type="dpo").state_dict() == {}
