"""Evaluation actors: processes that keep the engine of the checkpoint that they were last asked about."""

import hashlib
import queue
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from spo_ray.config.data import EngineConfig
from spo_ray.config.evaluate import AnnotatorConfig, LmEvalConfig
from spo_ray.data.sample import row_seed
from spo_ray.errors import UserError
from spo_ray.model.completion import Generations, Likelihood, Skipped, choose_engine
from spo_ray.runtime.artifact import versions
from spo_ray.runtime.cluster import engine_gpus

RESTARTS = 3
"""Of a process that died; its call is made again."""
SCORED_AT_ONCE = 256


class Pass(NamedTuple):
    """One answer to every question."""

    seed: int | None
    temperature: float
    """0 is greedy."""


class Evaluator:
    """One engine process; :class:`Actors` makes them."""

    def __init__(self, kind: str, config: EngineConfig, chat_template: str | None) -> None:
        self.kind, self.config, self.chat_template = kind, config, chat_template
        self.path: Path | None = None
        self.local: Any = None

    def answer(
        self, path: Path, asked: Sequence[tuple[str, Any]], passes: Sequence[Pass], max_tokens: int, batch_size: int
    ) -> list[list[Generations | Skipped]]:
        """For each pass one answer to every (id, prompt), or why there is none."""
        local = self._open(path)
        found: list[list[Generations | Skipped]] = []
        for seed, temperature in passes:
            answers: list[Generations | Skipped] = []
            for start in range(0, len(asked), batch_size):
                part = [(prompt, row_seed("eval", seed, i)) for i, prompt in asked[start : start + batch_size]]
                answers += local(part, n=1, temperature=temperature, max_tokens=max_tokens)
            found.append(answers)
        return found

    def score(self, path: Path, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Likelihood]:
        """How likely given completions are, for (prompt ids, completion ids)."""
        engine = self._open(path).engine
        parts = (rows[start : start + SCORED_AT_ONCE] for start in range(0, len(rows), SCORED_AT_ONCE))
        return [likelihood for part in parts for likelihood in engine.score(part)]

    def describe(self, path: Path) -> dict[str, str]:
        """Tokenizer, chat template and engine, for :class:`spo_ray.runtime.schema.Provenance`."""
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
        """A task of lm-evaluation-harness; see :mod:`spo_ray.evaluate.lm_eval`."""
        from spo_ray.evaluate.lm_eval_model import run_task

        return run_task(self._open(path), task, settings, seed)

    def judge(self, path: Path, requests: Sequence[Any], annotator: AnnotatorConfig) -> list[Any]:
        """Replies of a local judge; see :func:`spo_ray.evaluate.judge.local_replies`."""
        from spo_ray.evaluate.judge import local_replies

        return local_replies(self._open(path), requests, annotator)

    def _open(self, path: Path) -> Any:
        from spo_ray.model.engines import LocalAnswers
        from spo_ray.model.export import is_adapter, merge_adapter

        if self.path != path:
            if self.local is not None:
                self.local.engine.close()
            self.path = self.local = None
            if is_adapter(path):
                with tempfile.TemporaryDirectory() as folder:
                    merge_adapter(path, Path(folder))
                    self.local = LocalAnswers(self.kind, folder, self.config, self.chat_template)
            else:
                self.local = LocalAnswers(self.kind, str(path), self.config, self.chat_template)
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
        """See :meth:`Evaluator.answer`."""
        return _result(self._started().answer.remote(path, asked, passes, max_tokens, batch_size))

    def score(self, path: Path, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Likelihood]:
        """See :meth:`Evaluator.score`."""
        return _result(self._started().score.remote(path, rows))

    def describe(self, path: Path) -> dict[str, str]:
        """See :meth:`Evaluator.describe`."""
        return _result(self._started().describe.remote(path))

    def run_lm_eval(self, path: Path, task: str, settings: LmEvalConfig, seed: int) -> dict[str, Any]:
        """See :meth:`Evaluator.run_lm_eval`."""
        return _result(self._started().run_lm_eval.remote(path, task, settings, seed))

    def judge(self, path: Path, requests: Sequence[Any], annotator: AnnotatorConfig) -> list[Any]:
        """See :meth:`Evaluator.judge`."""
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


class Actors:
    """At most ``config.replicas`` evaluators, each started when it is first needed."""

    def __init__(self, config: EngineConfig, chat_template: str | None) -> None:
        self.kind, self.why = choose_engine(config)
        self.replicas = config.replicas
        self.arguments = (self.kind, config, chat_template)
        resources: Any = {"num_cpus": config.cpus, "num_gpus": engine_gpus(config)}
        self.remote: Any = ray.remote(max_restarts=RESTARTS, max_task_retries=RESTARTS, **resources)(Evaluator)
        self.free: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.started: list[Any] = []
        self.ended = False

    @contextmanager
    def lease(self, node: str | None = None) -> Generator[EvaluatorHandle]:
        """Lend one evaluator, so that successive calls about one checkpoint find its engine open.

        Its process starts at the first call, on the node of that id if one is given, unless an idle one is there.
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
        """End the processes for good, also for calls from other threads."""
        self.ended = True
        self.close()
