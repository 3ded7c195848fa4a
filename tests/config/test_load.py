import json
import math
import re
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
from pydantic import ValidationError

from spo_ray.config.keys import leaves, set_key, with_values
from spo_ray.config.load import load
from spo_ray.config.schema import Config
from spo_ray.errors import UserError
from spo_ray.pipeline.job import plan_job
from spo_ray.pipeline.plan import plan_text

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
WRITTEN = {ROOT / "configs" / "preferences.yaml"}  # by spo-ray init, with what its user may want to change
QUICKSTART = ROOT / "configs" / "quickstart.yaml"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_shipped_config_loads(path):
    config = load(path)
    assert config.methods
    assert Config.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize("path", sorted(set(CONFIGS) - WRITTEN), ids=lambda p: str(p.relative_to(ROOT)))
def test_shipped_configs_hold_only_what_differs_from_the_defaults(path):
    dump = partial(load(path).model_dump, mode="json", exclude_unset=True)
    given, differing = (dict(leaves(dump(exclude_defaults=without))) for without in (False, True))
    assert {key for key in given.keys() - differing.keys() if not key.endswith("type")} == set()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_shipped_config_can_be_dry_run(in_root, tmp_path, path):
    """Without a network, rows on the hub are unknown."""
    rows = (
        {"question": f"q{i}", "answer": i, "prompt": f"p{i}", "chosen": "yes", "rejected": "no"} for i in range(300)
    )
    split = "\n".join(map(json.dumps, rows))
    (tmp_path / "train.jsonl").write_text(split)
    (tmp_path / "test.jsonl").write_text(split)
    local = str(getattr(load(path).data, "path", "")).startswith("data/")  # which its user sets
    config = load(path, [f"output={tmp_path}", *([f"data.path={tmp_path}"] if local else [])])
    text = plan_text(plan_job(config), full=True)
    assert f'"name": "{config.name}"' in text
    for name, method in config.methods.items():
        assert re.search(rf"^method_{name} +build +[~\d,?]+ .* {method.type}[, ]", text, re.MULTILINE)


def test_every_field_is_explained_on_the_generated_page():
    rows = [line for line in (ROOT / "docs" / "configuration.md").read_text().splitlines() if line.startswith("| `")]
    assert rows
    assert not [row for row in rows if row.endswith("|  |")]


def test_overrides_reach_nested_fields_and_take_yaml_values():
    config = load(QUICKSTART, ["methods.spo.lambda_sft=5", "methods.spo.inner.eta=1e-6", "seed=3", "eval.seeds=[4, 5]"])
    assert config.methods["spo"].lambda_sft == 5.0
    assert config.methods["spo"].inner.eta == 1e-6
    assert (config.seed, config.eval.seeds) == (3, [4, 5])


def line_of(text):
    return 1 + next(i for i, line in enumerate(QUICKSTART.read_text().splitlines()) if text in line)


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (("  batch_size: 64", "  bach_size: 64"), ["sampling.bach_size", "did you mean 'batch_size'"]),
        (
            ("  parallel_methods: 2", "  paralel_methods: 2"),
            ["train.paralel_methods", "did you mean 'parallel_methods'"],
        ),
        (
            ("  dpo: {type: dpo}", "  dpo: {type: dpo, gamma: 1}"),
            ["methods.dpo.gamma", "known keys: beta, lr, type"],
        ),
        (("  max_length: 256", "  max_length: long"), ["train.max_length", "valid integer", "'long'"]),
        (("  probe_pairs: 64", "  probe_pairs: 0"), ["preference.probe_pairs", "greater than 0"]),
    ],
    ids=["typo", "typo2", "foreign", "type", "range"],
)
def test_mistakes_name_line_key_and_remedy(tmp_path, change, messages):
    path = tmp_path / "broken.yaml"
    path.write_text(QUICKSTART.read_text().replace(*change, 1))
    with pytest.raises(UserError) as caught:
        load(path)
    for message in [f"{path}:{line_of(change[0])}:", *messages]:
        assert message in str(caught.value)


def test_mistakes_on_the_command_line_are_told_from_those_in_the_file(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text(QUICKSTART.read_text().replace("  batch_size: 64", "  bach_size: 64", 1))
    overrides = ["sft.lrr=1", "methods.new={type: dpo, gamma: 1}", "seed=2"]
    with pytest.raises(UserError) as caught:
        load(path, overrides)
    places = {line.split(": ")[1]: line.split(": ")[0] for line in str(caught.value).splitlines()}
    assert places == {
        "sampling.bach_size": f"{path}:{line_of('  batch_size: 64')}",
        "sft.lrr": "command line",
        "methods.new.gamma": "command line",
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.precision=bfloat"], "did you mean 'bfloat16'?"),
        (["methods.new={type: sop}"], "did you mean 'spo'?"),
        (["seed"], "must look like key.sub=value"),
        ([f"name={'x' * 201}"], "name: String should have at most 200 characters"),
        (["seed=-1"], "seed: Input should be greater than or equal to 0"),
        (["eval.seeds=[4294967296]"], "eval.seeds.0: Input should be less than 4294967296"),
        (["name.x=1"], "holds a value, not a section"),
        (["methods.sft={type: dpo}"], "'sft' is reserved for a checkpoint"),
        (["sft=null", "methods.reference={type: dpo}"], "'reference' is reserved for a checkpoint"),
        (["methods.new={type: ppo}"], "methods.new"),
        (["train.checkpoint.best={metrik: 1}"], "best.metrik: unknown key; did you mean 'metric'?"),
        (["sampling.smaples=3"], "did you mean 'samples'"),
        (["train={}", "trian.num_workers=2"], "did you mean 'train'"),
        (["name=../elsewhere"], "name"),
        (["lr=1e-6"], "lr: unknown key; did you mean sft.lr or preference.theta.lr or preference.phi.lr?"),
        (["preference.lr=1e-6"], "did you mean preference.theta.lr or preference.phi.lr?"),
        (["gradient_accumulation=4"], "did you mean train.pairs_per_backward?"),
        (["probe_every=4"], "did you mean preference.probe_every?"),
        (["sft_data.pass_k=9"], "pass_k=9 needs as many sampling.samples"),
        (["methods.spo={type: spo, base: simpo, margin: 1}"], "write base: {type: simpo, margin: 1}"),
        (["methods.spo={type: spo, beta: 0.1}"], "write base: {type: dpo, beta: 0.1}"),
        (["methods.spo={type: spo, base: {type: simpo}, beta: 0.1}"], "write base: {type: simpo, beta: 0.1}"),
        (["methods.spo.base.margn=1"], "methods.spo.base.margn: unknown key; known keys: beta, lr, type"),
        (["methods.spo.base={type: simpo, margn: 1}"], "methods.spo.base.margn: unknown key; did you mean 'margin'?"),
        (["methods.spo.base={type: dpo, lr: 0.1}"], "set the method's own lr"),
        (["methods.spo.base={type: spo}"], "methods.spo.base: Input tag 'spo'"),
        (["methods.spo.safe_region={gap: inner}", "methods.spo.inner.steps=0"], "needs a lower level"),
        (["methods.dpo={type: cdpo, label_smoothing: 0.5}"], "less than 0.5"),
        (["train.cpu_offload=true", "train.sharding=none"], "train.cpu_offload needs train.sharding=full"),
        (["train.num_workers=2", "methods.spo.hinge=pair"], "methods.spo.hinge=pair needs train.sharding=none"),
        (["model.theta={type: last_layers, rank: 2}"], "rank"),
        (
            ["methods.spo={type: spo, base: {type: rpo}}"],
            "methods.spo reads the scores of pairs, which only preference",
        ),
    ],
)
def test_wrong_overrides_are_refused(overrides, message):
    with pytest.raises(UserError) as caught:
        load(QUICKSTART, overrides)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("every", "metric", "message"),
    [
        ("null", "probe/accuracy", "set train.checkpoint.every"),
        ("100", "probe/accuracy", "measured every preference.probe_every=200 steps"),
        ("200", "health/entropy", "measured every preference.health_every=500 steps"),
        ("400", "probe/accuracy", None),
        ("1", "loss", None),
    ],
)
def test_the_best_checkpoint_needs_its_metric_where_there_are_checkpoints(every, metric, message):
    intervals = ["preference.probe_every=200", "preference.health_every=500"]
    overrides = [*intervals, f"train.checkpoint={{every: {every}, best: {{metric: {metric}}}}}"]
    with pytest.raises(UserError, match=message) if message else nullcontext():
        load(ROOT / "configs" / "quickstart.yaml", overrides)


@pytest.mark.parametrize(("text", "message"), [("[1, 2]", "mapping"), ("a: [", "can't be read as YAML")])
def test_files_that_are_no_mapping(tmp_path, text, message):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load(path)
    with pytest.raises(UserError, match="no configuration file"):
        load(tmp_path / "absent.yaml")


def test_every_number_is_finite_and_in_range():
    overrides = ["engine.arguments={seed: 1}", "sweep.space={sft.lr: {type: grid, values: [0.1]}}", "seed=1"]
    tree = load(ROOT / "configs" / "sweeps" / "toy.yaml", overrides).model_dump(mode="json")
    numbers = {}
    for key, value in leaves({**tree, "engine": tree["engine"] | {"gpus": 1.0}}):
        if "." in key and isinstance(value, int | float) and not isinstance(value, bool) and "space" not in key:
            numbers[key] = value
    assert len(numbers) > 60
    for key in (*numbers, "seed", "sweep.space"):
        for wrong in (math.inf, -math.inf, math.nan, 1e300, 10**13):
            value = {"sft.lr": {"type": "grid", "values": [0.1, wrong]}} if key == "sweep.space" else wrong
            changed = json.loads(json.dumps(tree))
            set_key(changed, key, value)
            with pytest.raises(ValidationError):
                Config.model_validate(changed)
    told = {"sft.lr=.inf": r"sft\.lr: .*must be finite", "train.timeout_s=1e8": "less than or equal to 10000000"}
    for override, message in told.items():
        with pytest.raises(UserError, match=message):
            load(QUICKSTART, [override])
    with pytest.raises(UserError, match=r"methods\.spo\.lambda_sft: .*numbers must be finite and at most 1e\+12"):
        load(QUICKSTART, ["methods.spo.lambda_sft=1e300"])


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
HUGE = "no configuration has more than 262144 characters, 100000 values or 50 levels"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, HUGE),
        ("a: " + "[" * 3000 + "]" * 3000, HUGE),
        ("".join(f"{' ' * i}a:\n" for i in range(3000)), HUGE),
        (f"seed: {'9' * 5000}", "can't be read as YAML"),
        (f"seed: 0x{'f' * 5000}", r"seed: .*finite.* \(given: inf\)"),
        (f"seed: {'long ' * 5000}", r"seed: .*\(given: '(long ){39}long\.\.\.\)\n"),
        ("a: &a {<<: *a}", "can't be read as YAML"),
        ("x: " + "a" * 2**18, HUGE),
        ("".join(f"k{i}: 1\n" for i in range(100)), "\nand 84 more$"),
        ("name: 2001-99-99", "can't be read as YAML"),
    ],
    ids=["aliases", "lists", "mappings", "digits", "bits", "words", "merge", "characters", "keys", "date"],
)
def test_files_that_would_take_all_memory_are_refused(tmp_path, text, message):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load(path)


def test_an_override_that_would_take_long_to_read_is_refused():
    with pytest.raises(UserError, match=f"^override .*: {HUGE}"):
        load(QUICKSTART, ["a=" + "[" * 3000])


NO_SERVERS = ("", "example.com/v1", "file:///etc/passwd", "http://", "http://[", "http://x:99999/v1", "http://a b/")
TEACHER = "sft_data.teachers=[{{model: m, engine: {}, sampling: {{max_tokens: 900}}}}]"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sft_data.quantile=0.5", "set one of max_pass and quantile"),
        ("sft_data.max_pass=null", "set one of max_pass and quantile"),
        ("sft_data.strip=['(']", "is no regular expression"),
        ("sft_data.teachers=[{model: m}, samples]", "must stand before models"),
        (TEACHER.format("{type: vllm, max_model_len: 900}"), "leaves no room for a prompt"),
        (TEACHER.format("{type: endpoint, url: 'http://user:secret@host/v1'}"), "use api_key_env"),
        *((TEACHER.format(f"{{type: endpoint, url: '{url}'}}"), "no address of a server") for url in NO_SERVERS),
        ("engine.arguments={hf_token: x}", "may be a secret"),
        ("rounds=0", "greater than 0"),
        ("data={type: questions, path: x}", "verifier"),
        ("data={type: gsm8k, path: x, prompt: Solve}", "must contain {question}"),
        ("data={type: gsm8k, path: x, contamination_words: 1}", "greater than or equal to 3"),
    ],
)
def test_data_settings_that_cannot_be(override, message):
    with pytest.raises(UserError) as caught:
        load(QUICKSTART, [override])
    assert message in str(caught.value)


def test_values_at_dotted_keys_replace_what_was_there():
    config = load(QUICKSTART)
    changed = with_values(config, {"methods.spo.base.type": "simpo", "sft.lr": 0.5, "train.checkpoint.every": None})
    assert changed.methods["spo"].base.beta == 2.0, "SimPO's own default"
    assert (changed.sft.lr, changed.train.checkpoint.every) == (0.5, None)
    assert (
        with_values(changed, {"methods.spo.base.type": "dpo", "sft.lr": 1e-4, "train.checkpoint.every": 100}) == config
    )


def test_the_checkpoint_that_methods_start_from_has_a_name():
    assert load(QUICKSTART).reference == "sft"
    without = load(QUICKSTART, ["sft=null"])
    assert (without.sft, without.reference) == (None, "reference")
    assert with_values(without, {"seed": 3}).sft is None
    assert load(QUICKSTART, ["methods.reference={type: dpo}"]).methods["reference"].type == "dpo"


def test_rounds_need_questions():
    with pytest.raises(UserError, match="with preference data, set rounds=1"):
        load(QUICKSTART, ["data={type: preference, path: x}", "rounds=2"])
