"""The whole job, in order: sampling, SFT, pairs, reference log-probabilities, preference training, evaluation, report.

    python pipelines/full.py --config configs/quickstart.yaml [key=value ...]

Every stage lands in a folder of its own under ``runs/NAME`` and is reused as long as what it depends on stays the same.
The other scripts beside this one run the same job up to their own stage.
"""

import sys
from collections.abc import Iterator

from spo_ray.cli import script
from spo_ray.cluster import connect
from spo_ray.data.clean import clean_pairs
from spo_ray.data.recipe import preference_pairs, sft_set
from spo_ray.data.sources import load_data
from spo_ray.data.tokens import tokenise_pairs, tokenise_sft
from spo_ray.evaluate.evaluations import Evaluations
from spo_ray.preflight import preflight
from spo_ray.report.page import write_report
from spo_ray.run import Artifact, Run, external
from spo_ray.train.launch import Start, train_methods, train_sft
from spo_ray.train.reference import reference_logps


def stages(run: Run) -> Iterator[str]:
    """The job; the name of each finished part is yielded, so that a caller can stop there."""
    config = run.config
    has_pairs = config.data.type == "preference"
    preflight(config)
    test = load_data(run, "test")
    train = load_data(run, "train", against=test)
    yield "data"

    if not run.only_rehearsed:
        connect(config)
    base = external(config.model.path)
    chosen = clean_pairs(run, "pairs", train) if has_pairs else sft_set(run, base, train)
    yield "sample"

    sft = train_sft(run, base, tokenise_sft(run, chosen))
    yield "sft"

    first_two = {"base": base, "sft": sft}
    with Evaluations(run, test) as evaluations:
        evaluations.start(first_two)
        held_out = referenced(run, sft, test, "held_out_tokens", "held_out_pairs") if has_pairs else None
        pairs = chosen if has_pairs else preference_pairs(run, sft, chosen)
        yield "pairs"

        first = Start(sft, referenced(run, sft, pairs, "pair_tokens", "reference"))
        yield "reference"

        methods = train_methods(run, dict.fromkeys(config.methods, first), held_out)
        for number in range(2, config.rounds + 1):
            methods = next_round(run, methods, chosen, number)
        yield "train"

        found = evaluations.finish(first_two | methods)
        yield "evaluate"

        write_report(run, methods, found, pairs, test)
        yield "report"


def next_round(run: Run, policies: dict[str, Artifact], chosen: Artifact, number: int) -> dict[str, Artifact]:
    """Every method goes on from its own last checkpoint, on pairs with that checkpoint's mistakes."""
    starts = {}
    for name, policy in policies.items():
        suffix = f"_{name}_round{number}"
        pairs = preference_pairs(run, policy, chosen, suffix)
        starts[name] = Start(policy, referenced(run, policy, pairs, f"pair_tokens{suffix}", f"reference{suffix}"))
    return train_methods(run, starts, suffix=f"_round{number}")


def referenced(run: Run, policy: Artifact, pairs: Artifact, tokens: str, name: str) -> Artifact:
    """Pairs as token ids, then with the policy's log-probabilities before it is trained on them."""
    return reference_logps(run, name, policy, tokenise_pairs(run, tokens, pairs))


if __name__ == "__main__":
    sys.exit(script(stages, "report", "The whole job, from sampling to the report."))
