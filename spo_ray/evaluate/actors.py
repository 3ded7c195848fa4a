"""Ray actors that evaluate checkpoints; each keeps the engine of the checkpoint that it used last."""

import hashlib
import queue
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from spo_ray.config.data import EngineConfig
from spo_ray.config.evaluate import AnnotatorConfig, LmEvalConfig
from spo_ray.config.model import TemplateConfig
from spo_ray.data.sample import row_seed
from spo_ray.errors import EvaluatorLostError, UserError, first_line
from spo_ray.model.completion import Generations, Likelihood, Skipped, choose_engine
from spo_ray.runtime.artifact import versions
from spo_ray.runtime.cluster import REPEATED, engine_gpus
from spo_ray.runtime.heartbeat import Heartbeat, watched

SCORED_AT_ONCE = 256
"""Texts in one call of an engine's ``score``."""
READY_S = 1.0
"""Seconds in which an actor that has nothing to do answers."""
Texts = Sequence[tuple[Sequence[int], Sequence[int]]]
"""(prompt ids, completion ids) of texts to score."""


class Pass(NamedTuple):
    """Sampling settings for one answer to every question."""

    seed: int | None
    temperature: float
    """0 is greedy."""


class Evaluator:
    """Evaluates checkpoints with one engine; runs in a Ray actor that :class:`Actors` starts."""

    def __init__(self, kind: str, config: EngineConfig, template: TemplateConfig, beats: Path | None = None) -> None:
        self.kind, self.config, self.template = kind, config, template
        self.heartbeat = Heartbeat(beats, "an evaluator", config.timeout_s)
        self.path: Path | None = None
        self.local: Any = None

    def answer(
        self, path: Path, asked: Sequence[tuple[str, Any]], passes: Sequence[Pass], max_tokens: int, batch_size: int
    ) -> list[list[Generations | Skipped]]:
        """Return for each pass one answer to every (id, prompt)."""
        local = self._open(path)
        rounds: list[list[Generations | Skipped]] = []
        for seed, temperature in passes:
            answers: list[Generations | Skipped] = []
            for start in range(0, len(asked), batch_size):
                part = [(prompt, row_seed("eval", seed, i)) for i, prompt in asked[start : start + batch_size]]
                with self.heartbeat.call():
                    answers += local(part, n=1, temperature=temperature, max_tokens=max_tokens)
            rounds.append(answers)
        return rounds

    def score(self, path: Path, texts: Texts) -> list[Likelihood]:
        """Return the likelihoods of given completions."""
        engine = self._open(path).engine
        parts = (texts[start : start + SCORED_AT_ONCE] for start in range(0, len(texts), SCORED_AT_ONCE))
        found: list[Likelihood] = []
        for part in parts:
            with self.heartbeat.call():
                found += engine.score(part)
        return found

    def describe(self, path: Path) -> dict[str, str]:
        """Return tokenizer, chat template and engine for :class:`spo_ray.runtime.schema.Provenance`."""
        tokenizer = self._open(path).chat.tokenizer
        vocabulary = repr(sorted(tokenizer.get_vocab().items()))
        packages = versions()
        version = packages.get(self.kind) or packages.get(f"{self.kind}-cpu", "")
        return {
            "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
            "template": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest(),
            "engine": f"{self.kind} {version}, {self.config.dtype}",
        }

    def run_lm_eval(self, path: Path, task: str, settings: LmEvalConfig, seed: int) -> dict[str, Any]:
        """Return the results of :func:`spo_ray.evaluate.lm_eval_model.run_task`."""
        from spo_ray.evaluate.lm_eval_model import run_task

        return run_task(self._open(path), task, settings, seed)

    def judge(self, path: Path, requests: Sequence[Any], annotator: AnnotatorConfig) -> list[Any]:
        """Return the replies of :func:`spo_ray.evaluate.judge.local_replies`."""
        from spo_ray.evaluate.judge import local_replies

        local = self._open(path)
        with self.heartbeat.call():
            return local_replies(local, requests, annotator)

    def _open(self, path: Path) -> Any:
        from spo_ray.model.adapter import ModelSource, adapted, is_adapter
        from spo_ray.model.engines import LocalAnswers

        if self.path != path:
            if self.local is not None:
                self.local.engine.close()
            self.path = self.local = None
            with ExitStack() as stack:
                folder = path
                if is_adapter(path):
                    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                    ModelSource(adapted(path), path).merge(folder)
                self.local = LocalAnswers(self.kind, str(folder), self.config, self.template)
            self.path = path
        return self.local


class EvaluatorHandle:
    """Calls the methods of an :class:`Evaluator` in a Ray actor and waits for their results.

    Raises:
        UserError: the evaluator raised one.
        ray.exceptions.RayError: the evaluator raised another error, or its process died too often.
    """

    def __init__(self, kind: str, start: Callable[[], Any], free_engines: Callable[[], None] = lambda: None) -> None:
        self.kind, self.start, self.free_engines = kind, start, free_engines
        self.actor: Any = None
        """The actor that ``start`` returned at the first call; None before."""

    def answer(
        self, path: Path, asked: Sequence[tuple[str, Any]], passes: Sequence[Pass], max_tokens: int, batch_size: int
    ) -> list[list[Generations | Skipped]]:
        return _result(self._started().answer.remote(path, asked, passes, max_tokens, batch_size))

    def score(self, path: Path, texts: Texts) -> list[Likelihood]:
        return _result(self._started().score.remote(path, texts))

    def describe(self, path: Path) -> dict[str, str]:
        return _result(self._started().describe.remote(path))

    def run_lm_eval(self, path: Path, task: str, settings: LmEvalConfig, seed: int) -> dict[str, Any]:
        return _result(self._started().run_lm_eval.remote(path, task, settings, seed))

    def judge(self, path: Path, requests: Sequence[Any], annotator: AnnotatorConfig) -> list[Any]:
        return _result(self._started().judge.remote(path, requests, annotator))

    def _started(self) -> Any:
        if self.actor is None:
            self.actor = self.start()
        return self.actor


def _result(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from None
        raise


def require_alive(actor: Any) -> None:
    """Return if an evaluation actor is ready, busy or being restarted; wait for that at most ``READY_S`` seconds.

    Raises:
        EvaluatorLostError: it died more often than Ray restarts it.
    """
    try:
        ray.get(actor.__ray_ready__.remote(), timeout=READY_S)
    except GetTimeoutError:
        return
    except ActorDiedError as error:
        raise EvaluatorLostError(f"the evaluation actor is lost: {first_line(error)}") from None


class Actors:
    """Pool of at most ``config.replicas`` evaluators, each started when it is first needed."""

    def __init__(self, config: EngineConfig, template: TemplateConfig) -> None:
        self.kind, _ = choose_engine(config)
        self.replicas = config.replicas
        self.arguments = (self.kind, config, template, watched())
        resources: Any = {"num_cpus": config.cpus, "num_gpus": engine_gpus(config)}
        self.remote: Any = ray.remote(**REPEATED, **resources)(Evaluator)
        self.free: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.started: list[Any] = []
        self.ended = False

    @contextmanager
    def lease(self, node: str | None = None) -> Generator[EvaluatorHandle]:
        """Lend one evaluator, so that successive calls about one checkpoint find its engine open.

        The first call takes an idle process, or starts one on the node of that id if it is given.
        """
        evaluator = EvaluatorHandle(self.kind, lambda: self._any(node), self.close)
        try:
            yield evaluator
        except BaseException:
            if evaluator.actor is not None:
                ray.kill(evaluator.actor)
            raise
        if evaluator.actor is not None:
            self.free.put(evaluator.actor)

    def _any(self, node: str | None) -> Any:
        if self.ended:
            raise RuntimeError("the evaluation has ended")
        try:
            return self.free.get_nowait()
        except queue.Empty:
            place = {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)} if node else {}
            actor = self.remote.options(**place).remote(*self.arguments)
            self.started.append(actor)
            return actor

    def close(self) -> None:
        """End the processes; a later call starts new ones."""
        for actor in self.started:
            ray.kill(actor)
        self.started, self.free = [], queue.SimpleQueue()

    def end(self) -> None:
        """End the processes for good: later calls, also from other threads, fail."""
        self.ended = True
        self.close()
