"""Reference logps: computed once with the reference model and stored with the pairs."""

from pathlib import Path

import torch

from spo_ray.config.model import OWN_TEMPLATE, TemplateConfig
from spo_ray.core.logps import completion_logps
from spo_ray.model.collate import collate, rows_at_once
from spo_ray.model.displacement import ches_scores
from spo_ray.model.load import load_model
from spo_ray.model.tokenizer import ChatTokenizer
from spo_ray.runtime import schema
from spo_ray.runtime.artifact import Artifact, RowCounts
from spo_ray.runtime.cluster import uses_gpu, worker_work
from spo_ray.runtime.map_rows import Mapped, Pool, Row, map_shards
from spo_ray.runtime.run import Run, Stage, reading


def reference_logps(run: Run, name: str, model: Artifact, pairs: Artifact) -> Artifact:
    """Add the reference model's log-probabilities to tokenised pairs (:class:`schema.ReferencedPair`).

    They are computed again if the model, tokenizer, template, data, length limit or precision changes: these are in the
    settings, or in the digests of ``model`` and ``pairs``.
    """
    config = run.config
    with_ches = config.pairs.max_ches_quantile is not None

    def build(out: Path, counts: RowCounts) -> None:
        counts.keep_lengths(pairs)
        map_shards(
            name,
            pairs,
            out,
            counts,
            mapper=ReferenceLogps,
            kind=schema.ChesPair if with_ches else schema.ReferencedPair,
            batch_size=1024,
            pool=Pool(config.train.num_workers, config.train.cpus_per_worker, float(uses_gpu(config))),
            model=str(model.path),
            precision=config.train.precision,
            max_length=config.train.max_length,
            template=config.model,
            with_ches=with_ches,
        )

    settings = {"precision": config.train.precision} | ({"ches": True} if with_ches else {})
    work = worker_work(config, "reference log-probabilities", **reading(pairs, 2 * config.train.max_length))
    return run.execute(Stage(name, build, settings, {"model": model, "pairs": pairs}, work, resumable=True))


class ReferenceLogps:
    """Mapper that adds the reference model's logps (nats) to rows of tokenised pairs, with CHES scores if asked."""

    def __init__(
        self,
        model: str,
        precision: str,
        max_length: int,
        template: TemplateConfig = OWN_TEMPLATE,
        with_ches: bool = False,
    ) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.pad_id = ChatTokenizer.load(model, template).pad_id
        self.precision, self.size, self.with_ches = precision, rows_at_once(max_length), with_ches
        self.model = load_model(model).to(self.device).eval()

    def __call__(self, table: list[Row]) -> Mapped:
        columns = {f"ref_{side}_logps": self.score(table, f"{side}_ids") for side in ("chosen", "rejected")}
        scores: list[Row] = [{} for _ in table]
        if self.with_ches:
            scores = [s._asdict() for s in ches_scores(self.model, table, self.pad_id, self.size, self.device)]
        return [row | {key: v[i] for key, v in columns.items()} | scores[i] for i, row in enumerate(table)], []

    @torch.inference_mode()
    def score(self, table: list[Row], side: str) -> list[float]:
        """Return the logps of one side in the order of the rows; a batch has rows of similar length."""
        order = sorted(range(len(table)), key=lambda i: len(table[i]["prompt_ids"]) + len(table[i][side]))
        values = [0.0] * len(table)
        for start in range(0, len(order), self.size):
            indices = order[start : start + self.size]
            batch = collate([(table[i]["prompt_ids"], table[i][side]) for i in indices], self.pad_id)
            batch = {key: value.to(self.device) for key, value in batch.items()}
            with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.precision == "bfloat16"):
                logps, _ = completion_logps(self.model, batch["input_ids"], batch["labels"], batch["attention_mask"])
            for i, value in zip(indices, logps.tolist(), strict=True):
                values[i] = value
        return values
