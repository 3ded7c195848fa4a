"""The whole job, in order: sampling, SFT, pairs, reference log-probabilities, preference training, evaluation, report.

    python pipelines/full.py --config configs/quickstart.yaml [key=value ...]

Every stage lands in a folder of its own under ``runs/NAME`` and is reused as long as what it depends on stays the same.
The other scripts beside this one run the same job up to their own stage.
"""

import sys
from collections.abc import Iterator

from spo_ray.cli import script
from spo_ray.cluster import connect
from spo_ray.data.sample import sample
from spo_ray.data.sources import load_data
from spo_ray.data.stages import choose_sft_questions, make_pairs, score
from spo_ray.data.tokens import tokenise_pairs, tokenise_sft
from spo_ray.evaluate.accuracy import evaluate
from spo_ray.preflight import preflight
from spo_ray.report.page import write_report
from spo_ray.run import Run, external
from spo_ray.train.launch import train_methods, train_sft
from spo_ray.train.reference import reference_logps


def stages(run: Run) -> Iterator[str]:
    """The job; the name of each finished part is yielded, so that a caller can stop there."""
    config = run.config
    has_pairs = config.data.type == "preference"
    preflight(config)
    train, test = load_data(run, "train"), load_data(run, "test")
    yield "data"

    connect(config)
    base = external(config.model.path)
    if has_pairs:
        sft_source = train
    else:
        sft_source = choose_sft_questions(run, score(run, "base_scores", sample(run, "base_samples", base, train)))
    yield "sample"

    sft = train_sft(run, base, tokenise_sft(run, sft_source))
    yield "sft"

    if has_pairs:
        pairs, held_out = (
            train,
            reference_logps(run, "held_out_pairs", sft, tokenise_pairs(run, "held_out_tokens", test)),
        )
    else:
        pairs, held_out = make_pairs(run, score(run, "sft_scores", sample(run, "sft_samples", sft, sft_source))), None
    yield "pairs"

    referenced = reference_logps(run, "reference", sft, tokenise_pairs(run, "pair_tokens", pairs))
    yield "reference"

    methods = train_methods(run, sft, referenced, held_out)
    yield "train"

    answers = {} if has_pairs else evaluate(run, {"base": base, "sft": sft} | methods, test)
    yield "evaluate"

    write_report(run, methods, answers, test)
    yield "report"


if __name__ == "__main__":
    sys.exit(script(stages, "report", "The whole job, from sampling to the report."))
