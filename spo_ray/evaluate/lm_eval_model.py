"""Adapter of this project's engines to lm-evaluation-harness; importing it needs the harness."""

from collections.abc import Sequence
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import chunks, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from spo_ray.config.evaluate import LmEvalConfig

MAX_TOKENS = 256
"""Length of answers in tasks that do not set it."""
AT_ONCE = 64
"""Requests in one call of the engine."""


class EngineLM(TemplateLM):
    """Model interface of the harness on :class:`spo_ray.model.engines.LocalAnswers`."""

    tokenizer: Any

    def __init__(self, local: Any) -> None:
        super().__init__()
        self.local = local
        self.tokenizer = local.chat.tokenizer  # the harness reads this attribute
        self.longest = local.config.max_model_len - 1

    @property
    def eot_token_id(self) -> int:
        return self.local.chat.end_id

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return token ids, by default without special tokens: the chat template writes them."""
        return list(self.tokenizer(string, add_special_tokens=bool(add_special_tokens))["input_ids"])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        chat = self.local.chat
        if add_generation_prompt:
            return chat.prompt_text(chat_history)
        options = {"continue_final_message": True, "tokenize": False, **chat.arguments}
        return str(self.tokenizer.apply_chat_template(chat_history, **options))

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        cut = []
        for _, context, continuation in requests:
            kept = continuation[-(self.longest - 1) :]
            cut.append((context[-(self.longest - len(kept)) :], kept))
        return [(found.logp, found.greedy) for part in chunks(cut, AT_ONCE) for found in self.local.engine.score(part)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probabilities of whole texts (nats); texts longer than the context are scored in windows."""
        logps = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.longest - 1,
                context_len=1,
            )
            rows = [make_disjoint_window(window) for window in windows]
            logps.append(sum(likelihood.logp for likelihood in self.local.engine.score(rows)))
        return logps

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return answers, cut at the stop sequences.

        Requests with the same settings go through the engine together. Prompts that leave no room for an answer are cut
        at their beginning, as in the harness's own models.
        """
        answers: list[str] = [""] * len(requests)
        groups: dict[tuple[float, int], list[int]] = {}
        for number, request in enumerate(requests):
            settings = request.args[1]
            temperature = float(settings.get("temperature", 1.0)) if settings.get("do_sample") else 0.0
            length = normalize_gen_kwargs(settings, MAX_TOKENS)["max_gen_toks"]
            groups.setdefault((temperature, min(length, self.longest // 2)), []).append(number)
        for (temperature, length), numbers in groups.items():
            for part in chunks(numbers, AT_ONCE):
                prompts = [self.tok_encode(requests[n].args[0])[-(self.longest - length - 1) :] for n in part]
                found = self.local.engine.generate(prompts, n=1, temperature=temperature, max_tokens=length, seeds=part)
                for number, (answer,) in zip(part, found, strict=True):
                    stops = requests[number].args[1].get("until")
                    answers[number] = postprocess_generated_text(answer.text, stops, None)
        return answers


def run_task(local: Any, task: str, settings: LmEvalConfig, seed: int) -> dict[str, Any]:
    """Run a task with an engine in this process (:class:`spo_ray.model.engines.LocalAnswers`).

    Returns:
        The harness's ``results`` by task, and ``n``, the number of documents by task.
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
