"""The search space, its lists of trials, and how many fit on a cluster: nothing here starts Ray."""

from collections import Counter
from pathlib import Path

import pytest
from scipy import stats

from spo_ray.config.keys import with_values
from spo_ray.config.load import load
from spo_ray.errors import UserError
from spo_ray.pipeline.plan import trials_text
from spo_ray.sweep.space import listed_points, short_names, trial_config, trial_count
from spo_ray.sweep.tuner import trial_room

TOY = str(Path(__file__).resolve().parents[2] / "configs" / "sweeps" / "toy.yaml")
LAMBDA = "methods.spo.lambda_sft"


def space(**dimensions):
    entries = ", ".join(f"{key.replace('__', '.')}: {text}" for key, text in dimensions.items())
    return f"sweep.space={{{entries}}}"


def test_the_toy_sweep_has_every_combination_once():
    points = listed_points(load(TOY))
    combinations = {tuple(point["values"].values()) for point in points}
    assert len(points) == len(combinations) >= 12
    assert [point["number"] for point in points] == list(range(len(points)))
    assert combinations >= {(0.01, 0.0, 0.1), (30.0, 0.01, 0.5)}


def test_random_draws_follow_their_distributions():
    """Log-uniform: Kolmogorov-Smirnov against scipy's; choices: a chi-squared test. Both would fail 1 time in 1,000."""
    given = space(
        methods__spo__lambda_sft="{type: loguniform, low: 1e-3, high: 100}",
        methods__spo__base__beta="{type: choice, values: [0.1, 0.2, 0.5]}",
    )
    points = listed_points(load(TOY, [given, "sweep.searcher=random", "sweep.samples=600"]))
    drawn = [point["values"][LAMBDA] for point in points]
    assert stats.kstest(drawn, stats.loguniform(1e-3, 100).cdf).pvalue > 1e-3
    counts = Counter(point["values"]["methods.spo.base.beta"] for point in points)
    assert set(counts) == {0.1, 0.2, 0.5}
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


def test_grids_are_combined_with_draws_and_seeds():
    given = space(
        methods__spo__lambda_sft="{type: loguniform, low: 0.1, high: 10}",
        methods__spo__base__beta="{type: grid, values: [0.1, 0.5]}",
    )
    overrides = [given, "sweep.searcher=random", "sweep.samples=3", "sweep.seeds=[4, 5]"]
    points = listed_points(load(TOY, overrides))
    assert len(points) == 3 * 2 * 2
    assert [point["seed"] for point in points[:4]] == [4, 5, 4, 5]
    assert [point["values"]["methods.spo.base.beta"] for point in points[:4]] == [0.1, 0.1, 0.5, 0.5]
    assert len({point["values"][LAMBDA] for point in points}) == 3
    assert listed_points(load(TOY, overrides)) == points
    assert listed_points(load(TOY, [*overrides, "seed=1"])) != points


def test_equal_draws_are_tried_once():
    given = space(
        methods__spo__lambda_sft="{type: choice, values: [1.0, 2.0]}",
        methods__spo__base__beta="{type: grid, values: [0.1, 0.5, 0.1]}",
    )
    overrides = [given, "sweep.searcher=random", "sweep.samples=20", "sweep.seeds=[3, 4, 3]"]
    points = listed_points(load(TOY, overrides))
    assert len({(*point["values"].values(), point["seed"]) for point in points}) == len(points) == 2 * 2 * 2
    assert [point["number"] for point in points] == list(range(8))
    assert [point["seed"] for point in points] == [3, 4] * 4
    first = next(iter(points))["values"]
    assert points[2]["values"] == first | {"methods.spo.base.beta": 0.5}  # in the order of the draws
    assert trial_count(load(TOY, overrides)) == 8
    assert trial_count(load(TOY, [given, "sweep.searcher=optuna", "sweep.samples=20"])) == 20


def test_parameters_with_the_same_end_have_their_whole_keys():
    keys = ["sft.lr", "methods.spo.lr", "methods.spo.safe_region.lr", "preference.theta.lr", "methods.spo.base.beta"]
    assert list(short_names(keys).values()) == [*keys[:3], "theta.lr", "beta"]
    assert short_names(["sft.lr", "methods.spo.base.beta"]) == {"sft.lr": "lr", "methods.spo.base.beta": "beta"}


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("methods__spo__lambda", "{type: grid, values: [1]}", "did you mean 'methods.spo.lambda_sft'?"),
        ("preference__theta__rl", "{type: grid, values: [1]}", "did you mean 'preference.theta.lr'?"),
        ("methods__dpo__beta", "{type: grid, values: [1]}", "sweep.space.methods.dpo.beta: unknown key; did you mean"),
        ("engine__cpus", "{type: grid, values: [1]}", "is the same for all trials"),
        (LAMBDA.replace(".", "__"), "{type: grid, values: [1, -2]}", "-2 can't be its value: Input should be greater"),
        (LAMBDA.replace(".", "__"), "{type: loguniform, low: 2, high: 1}", "low=2 must be below high=1"),
        (LAMBDA.replace(".", "__"), "{type: normal, mean: 1}", "does not match any of the expected tags"),
    ],
)
def test_a_wrong_space_is_refused(key, text, message):
    with pytest.raises(UserError) as error:
        load(TOY, [space(**{key: text})])
    assert message in str(error.value)


def test_a_wrong_key_is_named_with_its_line(tmp_path):
    file = tmp_path / "sweep.yaml"
    text = Path(TOY).read_text().replace("methods.spo.gamma:", "methods.spo.gama:")
    file.write_text(text)
    line = 1 + next(i for i, found in enumerate(text.splitlines()) if "spo.gama:" in found)
    with pytest.raises(UserError, match=f":{line}: sweep.space.methods.spo.gama: .*'methods.spo.gamma'"):
        load(file)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sweep.method=dpo"], "sweep.method=dpo is none of the methods: spo"),
        (["methods.dpo={type: dpo}", "sweep.method=dpo"], "the trials train methods.dpo alone"),
        (["sweep.score_at=[0.5, 0.2, 1.0]"], "must rise and end with 1.0"),
        (["sweep.searcher=optuna", "sweep.seeds=[0, 1]"], "give one seed"),
        (["sweep.scheduler=pbt"], "Input should be 'asha' or 'fifo'"),
        (["preference.alarm.on_alarm=stop"], "set sweep.max_fall"),
        (["sweep.objectives=[held_out_reward_accuracy]", "sweep.validation.pairs=0"], "needs validation.pairs"),
        (
            ["sweep.objectives=[-health/greedy/length]"],
            "health/greedy/length is measured by none of the suites accuracy",
        ),
        (["data={type: preference, path: x}", "eval.suites=[health]"], "accuracy_greedy is measured by none of"),
        (
            [
                "data={type: preference, path: x}",
                "eval.suites=[health]",
                "sweep.objectives=[reward_accuracy]",
                "sweep.validation={pairs: 0}",
            ],
            "set sweep.validation.pairs",
        ),
        (
            [
                "eval.alpaca={annotators: [{name: a, model: m, engine: {type: vllm}}]}",
                "eval.suites=[accuracy, alpaca_eval]",
            ],
            "give every annotator engine.type=endpoint",
        ),
        (
            [space(methods__spo__lambda_sft="{type: choice, values: [1, 2]}")],
            "searcher grid takes grids alone",
        ),
        (
            ["sft=null", "sweep.space={sft.lr: {type: grid, values: [1e-4]}}"],
            "sweep.space.sft.lr: there is no SFT stage",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(overrides, message):
    with pytest.raises(UserError) as error:
        load(TOY, overrides)
    assert message in str(error.value)


def test_a_trial_is_a_complete_configuration_of_its_own():
    config = trial_config(load(TOY), {LAMBDA: 7.0, "preference.theta.lr": 1e-5}, 3)
    assert config.methods["spo"].lambda_sft == 7.0
    assert config.preference.theta.lr == 1e-5
    assert (config.seed, config.sweep) == (3, None)
    assert with_values(load(TOY), {}) == load(TOY)


CPU4 = [{"CPU": 4.0}]


@pytest.mark.parametrize(
    ("overrides", "nodes", "expected"),
    [
        ([], [{"CPU": 2.0}], 1),
        ([], CPU4, 3),  # beside an evaluation actor
        (["sweep.max_concurrent=1"], CPU4, 1),
        ([], [{"CPU": 2.0}, {"CPU": 2.0}], 3),
        ([], [{"CPU": 1.5}, {"CPU": 1.5}], 1),
        (["engine.replicas=2"], [{"CPU": 2.0}, {"CPU": 2.0}], 2),
        (["train.num_workers=2"], CPU4, 1),
        (["train.num_workers=2", "train.placement=STRICT_SPREAD"], CPU4, None),
        (["train.num_workers=2", "train.placement=STRICT_SPREAD"], [{"CPU": 4.0}, {"CPU": 2.0}], 2),
        (["train.num_workers=2", "train.placement=STRICT_PACK"], [{"CPU": 2.0}, {"CPU": 2.0}], 1),
        ([], [{"CPU": 1.0}], None),
        (["train.cpus_per_worker=4"], CPU4, None),
        (["train.use_gpu=true"], CPU4, None),
        (["engine.gpus=1"], CPU4, None),
        ([], [{"CPU": 16.0, "GPU": 3.0}], 2),
        ([space(sft__lr="{type: loguniform, low: 1e-5, high: 1e-4}"), "sweep.searcher=random"], [{"CPU": 5.0}], 2),
    ],
)
def test_as_many_trials_as_there_is_room_for(overrides, nodes, expected):
    config = load(TOY, overrides)
    if expected is None:
        with pytest.raises(UserError, match=r"too few resources: a trial needs"):
            trial_room(config, nodes)
    else:
        assert trial_room(config, nodes) == expected


def test_a_dry_run_lists_the_trials():
    text = trials_text(load(TOY))
    assert text.endswith(f"{len(listed_points(load(TOY)))} trials")
    assert "00000  methods.spo.lambda_sft=0.01" in text
    given = space(methods__spo__lambda_sft="{type: loguniform, low: 0.1, high: 10}")
    text = trials_text(load(TOY, [given, "sweep.searcher=optuna", "sweep.samples=9"]))
    assert "9 suggestions by Optuna for methods.spo.lambda_sft;" in text
