"""Reference log-probabilities: computed once from the SFT model, stored with the pairs."""

from pathlib import Path
from typing import Any

from spo_ray import rows
from spo_ray.cluster import uses_gpu
from spo_ray.run import Artifact, Ledger, Run
from spo_ray.shards import Mapper, Pool, map_shards


def reference_logps(run: Run, name: str, model: Artifact, pairs: Artifact) -> Artifact:
    """Add the reference model's log-probabilities to tokenised pairs (:class:`rows.ReferencedPair`).

    They stay valid for this model, tokenizer, template, data and length limit: all are in the stage's identity.
    """
    config = run.config

    def build(out: Path, ledger: Ledger) -> None:
        map_shards(
            name,
            pairs,
            out,
            ledger,
            mapper=_scorer,
            kind=rows.ReferencedPair,
            batch_size=1024,
            pool=Pool(config.train.num_workers, config.train.cpus_per_worker, float(uses_gpu(config))),
            model=str(model.path),
            precision=config.train.precision,
            max_length=config.train.max_length,
        )

    settings = {"precision": config.train.precision}
    return run.stage(name, build, config=settings, inputs={"model": model, "pairs": pairs}, resumable=True)


def _scorer(**arguments: Any) -> Mapper:
    from spo_ray.train.scorer import Scorer  # heavy: imported where it runs

    return Scorer(**arguments)
