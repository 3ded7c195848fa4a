"""Sampling a policy: Ray Data over a pool of engines."""

import hashlib
import importlib.util
from pathlib import Path

from spo_ray import rows
from spo_ray.cluster import engine_gpus
from spo_ray.config import EngineConfig, SamplingConfig
from spo_ray.errors import UserError
from spo_ray.run import Artifact, Ledger, Run, require_rows
from spo_ray.shards import Mapped, Pool, Row, map_shards


def sample(run: Run, name: str, model: Artifact, questions: Artifact) -> Artifact:
    """Sample ``sampling.samples`` responses to every question (:class:`rows.Samples`).

    ``questions`` holds :class:`rows.Prompt` or :class:`rows.SftQuestion`. Each question has a seed of its own, made of
    the run's seed, the stage and the question's id, so a retried batch gives the same samples.
    """
    config = run.config
    kind, why = choose(config.engine)

    def build(out: Path, ledger: Ledger) -> None:
        require_rows(questions.rows(), f"questions for {name}")
        ledger.facts |= {"engine": f"{kind} ({why})", "model": str(model.path)}
        map_shards(
            name,
            questions,
            out,
            ledger,
            mapper=_Sampler,
            kind=rows.Samples,
            batch_size=config.sampling.batch_size,
            pool=Pool(config.engine.replicas, config.engine.cpus, engine_gpus(config)),
            engine_kind=kind,
            model=str(model.path),
            engine=config.engine,
            sampling=config.sampling,
            chat_template=config.model.chat_template,
            seed=f"{config.seed}:{name}",
        )

    settings = {
        "engine": kind,
        "dtype": config.engine.dtype,
        "max_model_len": config.engine.max_model_len,
        "chat_template": config.model.chat_template,
        **config.sampling.model_dump(),
    }
    return run.stage(name, build, config=settings, inputs={"model": model, "questions": questions})


def choose(config: EngineConfig) -> tuple[str, str]:
    """(engine, why).

    Raises:
        UserError: vLLM is asked for and not installed.
    """
    installed = importlib.util.find_spec("vllm") is not None
    if config.type == "vllm" and not installed:
        raise UserError("engine.type=vllm, but vLLM is not installed: make setup, or engine.type=transformers")
    if config.type != "auto":
        return config.type, "as configured"
    return ("vllm", "installed") if installed else ("transformers", "vLLM is not installed; expect it to be slow")


def row_seed(*parts: object) -> int:
    """A 31-bit seed from anything printable."""
    return int.from_bytes(hashlib.sha256(":".join(map(str, parts)).encode()).digest()[:4], "big") >> 1


class _Sampler:
    """A mapper that holds one engine."""

    def __init__(
        self,
        engine_kind: str,
        model: str,
        engine: EngineConfig,
        sampling: SamplingConfig,
        chat_template: str | None,
        seed: str,
    ) -> None:
        from spo_ray.data.engines import open_engine  # heavy: engines are imported where they run
        from spo_ray.model.tokenise import ChatTokenizer

        self.chat = ChatTokenizer.load(model, chat_template)
        self.engine = open_engine(engine_kind, model, engine, self.chat)
        self.sampling, self.seed = sampling, seed
        self.longest = engine.max_model_len - 1

    def __call__(self, batch: list[Row]) -> Mapped:
        prompts = [self.chat.prompt_ids(row["prompt"]) for row in batch]
        fits = [i for i, ids in enumerate(prompts) if len(ids) < self.longest]
        rejected: list[rows.Rejected] = [
            {"id": row["id"], "reason": "prompt longer than engine.max_model_len", "excerpt": row["prompt"][:200]}
            for row, ids in zip(batch, prompts, strict=True)
            if len(ids) >= self.longest
        ]
        if not fits:
            return [], rejected
        answers = self.engine.generate(
            [prompts[i] for i in fits],
            n=self.sampling.samples,
            temperature=self.sampling.temperature,
            max_tokens=self.sampling.max_tokens,
            seeds=[row_seed(self.seed, batch[i]["id"]) for i in fits],
        )
        kept = [
            {"responses": []}
            | batch[i]
            | {
                "samples": [c.text for c in completions],
                "sample_logps": [c.logp for c in completions],
                "sample_tokens": [c.tokens for c in completions],
                "finished": [c.finished for c in completions],
            }
            for i, completions in zip(fits, answers, strict=True)
        ]
        return kept, rejected
