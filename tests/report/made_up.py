"""Finished runs and sweeps whose answers and curves are known, in the form that the stages leave behind."""

import json
import random

from spo_ray.config.load import load
from spo_ray.data.toy import problems
from spo_ray.evaluate.evaluations import Evaluations
from spo_ray.runtime import schema
from spo_ray.runtime.artifact import write_json, write_rows
from spo_ray.runtime.run import Run, Stage
from spo_ray.sweep.results import write_csv

SEEDS = [0, 1]
STEPS = 6


def made_up_run(root, name, rights, *overrides, questions=12, seed=0):
    """A finished run; ``rights`` has each checkpoint's number of questions that it answers rightly."""
    config = load("configs/quickstart.yaml", [f"output={root}", f"name={name}", f"seed={seed}", *ALONE, *overrides])
    methods = {key: config.methods[key] for key in rights if key in config.methods}
    run = Run(config.model_copy(update={"methods": methods}))
    test, sft = start(run, questions)
    write_pairs(run)
    models = {key: sft for key in rights if key not in methods}
    for key in methods:
        for suffix in ["", *(f"_round{number}" for number in range(2, config.rounds + 1))]:
            inputs = {"model": models.get(key, sft)}
            models[key] = run.execute(Stage(f"method_{key}{suffix}", trained(key), config={}, inputs=inputs))
    measure(run, test, models, rights)
    write_json(run.root / "config.json", run.config.model_dump(mode="json"))
    return run.root


ALONE = ["eval.suites=[accuracy]", f"eval.seeds={SEEDS}"]


def made_up_sweep(root, name, right, questions=12, finish=True):
    """A sweep of four trials, of which the last is the best; ``right`` as above for it."""
    lambdas = [0.01, 0.1, 1.0, 30.0]
    space = f"sweep.space={{methods.spo.lambda_sft: {{type: grid, values: {lambdas}}}}}"
    config = load("configs/sweeps/toy.yaml", [f"output={root}", f"name={name}", *ALONE, space])
    run = Run(config)
    test, sft = start(run, questions)
    table = []

    def build(out, counts):
        for number, value in enumerate(lambdas):
            trial = f"{number:05d}"
            (out / trial).mkdir()
            trained("spo")(out / trial / "training", counts)
            scores = {"accuracy_greedy": {"value": 0.5 + 0.1 * number}, "accuracy_sampled": {"value": 0.4}}
            row = {"trial": trial, "values": {"methods.spo.lambda_sft": value}, "seed": 0}
            row |= {"status": "finished" if finish else "stopped", "reason": "", "steps": STEPS, "share": 1.0}
            row |= {"seconds": 1.0, "restarts": 0, "bytes": 1000, "checkpoint": False}
            row |= {"scores": scores | {"delta_logp_chosen": {"value": 0.1}}}
            write_json(out / trial / "row.json", row)
            table.append(row)

    trials = run.execute(Stage("trials", build, config={}, inputs={"0sft": sft}))
    write_csv(run.root / "results.csv", table, config.sweep)
    if finish:
        best = type(trials)(trials.path / "00003" / "training", f"{trials.digest}/00003")
        measure(run, test, {"sft": sft, "trial_00003": best}, {"sft": 6, "trial_00003": right})
    write_json(run.root / "config.json", run.config.model_dump(mode="json"))
    return run.root


def start(run, questions):
    """The test questions, and an empty SFT checkpoint."""

    def ask(out, counts):
        found = problems("test", run.config.seed)
        table = [next(found) for _ in range(questions)]
        prompts = [{"id": f"test-{i}", "prompt": p.question, "gold": p.solution} for i, p in enumerate(table)]
        write_rows(out / "part-0.parquet", prompts, schema.Prompt)

    return (
        run.execute(Stage("data_test", ask, config={"questions": questions}, inputs={})),
        run.execute(Stage("sft", lambda out, counts: None, config={}, inputs={})),
    )


def write_pairs(run):
    def build(out, counts):
        text = {"chosen": "2 + 3 = 5.", "rejected": "2 + 3 = 6, and more.", "source_id": "q"}
        sources = {"chosen_source": "gold", "rejected_source": "sft_samples:0"}
        turn = [{"role": "user", "content": "How much are 2 and 3?"}]
        table = [{"id": f"p{i}", "prompt": turn, **text, **sources} for i in range(3)]
        counts.reject("p9", "no wrong sample", "<b>excerpt</b>")
        write_rows(out / "part-0.parquet", table, schema.Pair)

    return run.execute(Stage("pairs", build, config={}, inputs={}))


def trained(name):
    """A training's log and result: log pi of the chosen answers moves by +1 (spo) or -2 nats."""

    def build(out, counts):
        out.mkdir(exist_ok=True)
        gain = 1.0 if name == "spo" else -2.0
        log = []
        for step in range(STEPS + 1):
            share = step / STEPS
            record = {
                "step": step,
                "total_steps": STEPS,
                "logps/chosen_change": gain * share,
                "logps/rejected_change": -share,
            }
            record |= {"probe/logps/chosen": -9 + gain * share, "probe/logps/rejected": -8 - 4 * share}
            record |= {"dynamics/chosen_term": 5.0, "dynamics/rejected_term": -5.0, "health/repetition": share / 2}
            log.append(json.dumps(record))
        (out / "log.jsonl").write_text("\n".join(log) + "\n")
        train = {"delta_logp_chosen": gain, "delta_logp_rejected": -4.0, "n": 3}
        write_json(out / "result.json", {"train": train, "steps": STEPS})

    return build


def measure(run, test, models, rights):
    """Graded answers, and what the evaluation makes of them: the first so many questions are answered rightly."""
    evaluations = Evaluations(run)
    for name, model in models.items():

        def build(out, counts, name=name):
            table = []
            for seed in (None, *SEEDS):
                for i, row in enumerate(test.rows()):
                    right = i < rights[name]
                    text = f"{row['gold']} by {name}" if right else f"<script>alert({i})</script> {name}"
                    answer = {"id": row["id"], "method": name, "seed": seed, "response": text, "extracted": None}
                    table.append(answer | {"correct": right, "strict": right})
            random.Random(0).shuffle(table)
            counts.facts["provenance"] = dict.fromkeys(("model", "tokenizer", "template", "engine"), "x") | {
                "sampling": {}
            }
            write_rows(out / "part-0.parquet", table, schema.EvalRow)

        inputs = {"model": model, "questions": test}
        artifact = run.execute(Stage(f"eval_{name}", build, config={"rights": rights[name]}, inputs=inputs))
        evaluations.measured["accuracy", name] = artifact
    return evaluations._collect(list(models), {})
