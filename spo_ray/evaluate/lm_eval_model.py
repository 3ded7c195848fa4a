"""lm-evaluation-harness' view of an engine, and its tasks."""

from collections.abc import Iterator, Sequence
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

from spo_ray.config.evaluate import LmEvalConfig

MAX_TOKENS = 256
"""Of answers to tasks that do not say."""
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
AT_ONCE = 64
"""Requests in one call of the engine."""


class EngineLM(TemplateLM):
    """What the harness asks of a model, by :class:`spo_ray.model.engines.LocalAnswers`."""

    def __init__(self, local: Any) -> None:
        super().__init__()
        self.local = local
        self.texts: Any = local.chat.tokenizer
        self.tokenizer = self.texts  # the harness looks for it there
        self.longest = local.config.max_model_len - 1

    @property
    def eot_token_id(self) -> int:
        return self.local.chat.end_id

    @property
    def tokenizer_name(self) -> str:
        return str(self.texts.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The chat template writes special tokens where they belong."""
        return list(self.texts(string, add_special_tokens=bool(add_special_tokens))["input_ids"])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        text = self.texts.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        cut = []
        for _, context, continuation in requests:
            kept = continuation[-(self.longest - 1) :]
            cut.append((context[-(self.longest - len(kept)) :], kept))
        return [(found.logp, found.greedy) for part in _parts(cut) for found in self.local.engine.score(part)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Texts longer than the engine takes are scored in pieces, each after the end of the one before."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        found = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.longest - 1,
                context_len=1,
            )
            rows = [make_disjoint_window(window) for window in windows]
            found.append(sum(likelihood.logp for likelihood in self.local.engine.score(rows)))
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Requests with the same settings go through the engine together; answers are cut at the stop sequences.

        Prompts that leave no room for an answer lose their beginning, as in the harness's own models.
        """
        found: list[str] = [""] * len(requests)
        groups: dict[tuple[float, int], list[int]] = {}
        for number, request in enumerate(requests):
            settings = request.args[1]
            temperature = float(settings.get("temperature", 1.0)) if settings.get("do_sample") else 0.0
            most = next((int(settings[name]) for name in LENGTHS if name in settings), MAX_TOKENS)
            groups.setdefault((temperature, min(most, self.longest // 2)), []).append(number)
        for (temperature, most), numbers in groups.items():
            for part in _parts(numbers):
                prompts = [self.tok_encode(requests[n].args[0])[-(self.longest - most - 1) :] for n in part]
                answers = self.local.engine.generate(prompts, n=1, temperature=temperature, max_tokens=most, seeds=part)
                for number, (answer,) in zip(part, answers, strict=True):
                    found[number] = _until(answer.text, requests[number].args[1].get("until") or [])
        return found


def _parts(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (items[start : start + AT_ONCE] for start in range(0, len(items), AT_ONCE))


def _until(text: str, stops: str | list[str]) -> str:
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.split(stop)[0] if stop else text
    return text


def run_task(local: Any, task: str, settings: LmEvalConfig, seed: int) -> dict[str, Any]:
    """Run a task with an engine in this process (:class:`spo_ray.model.engines.LocalAnswers`).

    Returns:
        The harness's ``results`` by task, and ``n``, the documents of each.
    """
    found: Any = simple_evaluate(
        model=EngineLM(local),
        tasks=[task],
        num_fewshot=settings.num_fewshot,
        limit=settings.limit,
        task_manager=TaskManager(include_path=str(settings.include_path) if settings.include_path else None),
        apply_chat_template=True,
        log_samples=False,
        bootstrap_iters=1000,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    counts = {name: samples["effective"] for name, samples in found["n-samples"].items()}
    counts |= {name: sum(counts.values()) for name in found["results"] if name not in counts}  # a group of tasks
    return {"results": found["results"], "n": counts}
