"""Engines that generate and score text: vLLM, or transformers where vLLM can't be installed."""

import gc
import os
import tempfile
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers import GenerationConfig

from spo_ray.config.data import EngineConfig
from spo_ray.config.model import TemplateConfig
from spo_ray.core.logps import IGNORE, completion_logps
from spo_ray.errors import RowRejectedError
from spo_ray.model.checkpoint_config import generation_settings
from spo_ray.model.checkpoint_files import check_finite, stored_tensors
from spo_ray.model.collate import TokenRow, collate, rows_at_once
from spo_ray.model.completion import (
    TOO_LONG,
    Completion,
    Generations,
    Likelihood,
    Skipped,
    fits_context,
)
from spo_ray.model.export import read_probe
from spo_ray.model.generate import generate
from spo_ray.model.load import load_model
from spo_ray.model.tokenizer import ChatTokenizer

PROBE_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
"""Largest allowed difference (nats per token) between the engine's and the trainer's logp of the probe text."""


class Engine(Protocol):
    """Interface of an engine that serves one checkpoint."""

    def generate(
        self, prompts: Sequence[list[int]], *, n: int, temperature: float, max_tokens: int, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        """Return ``n`` completions per prompt (token ids); ``seeds`` has one per prompt; temperature 0 is greedy."""
        ...

    def score(self, rows: Sequence[TokenRow]) -> list[Likelihood]:
        """Return the likelihoods of given completions, for (prompt ids, completion ids)."""
        ...

    def close(self) -> None:
        """Free the memory, so that this process can serve another checkpoint."""
        ...


def open_engine(kind: str, path: str, config: EngineConfig, chat: ChatTokenizer) -> Engine:
    """Load a checkpoint, and compare the engine's logp of the checkpoint's probe text with the trainer's.

    Raises:
        RuntimeError: they differ by more than PROBE_TOLERANCE.
        UserError: the weights are incomplete, damaged or not finite.
    """
    engine: Engine = ENGINES[kind](path, config, chat)
    probe = read_probe(path)
    if probe is not None:
        (found,) = engine.score([(probe["prompt_ids"], probe["completion_ids"])])
        per_token = abs(found.logp - probe["logp"]) / len(probe["completion_ids"])
        if not per_token <= PROBE_TOLERANCE[config.dtype]:
            engine.close()
            raise RuntimeError(
                f"{kind} gives {path} another log-probability than the trainer did ({per_token:.2g} nats a token): "
                "its weights are stale or its precision is too low"
            )
    return engine


class LocalAnswers:
    """Generates answers with an engine in this process."""

    def __init__(self, kind: str, path: str, config: EngineConfig, template: TemplateConfig) -> None:
        self.chat = ChatTokenizer.load(path, template)
        self.config = config
        self.engine = open_engine(kind, path, config, self.chat)

    def __call__(
        self, asked: Sequence[tuple[Any, int]], *, n: int, temperature: float, max_tokens: int
    ) -> list[Generations | Skipped]:
        """Return ``n`` answers to every (prompt, seed)."""
        prompts = [self.prompt_ids(prompt) for prompt, _ in asked]
        able = [ids for ids in prompts if not isinstance(ids, Skipped)]
        seeds = [seed for ids, (_, seed) in zip(prompts, asked, strict=True) if not isinstance(ids, Skipped)]
        options: Any = {"n": n, "temperature": temperature, "max_tokens": max_tokens, "seeds": seeds}
        answers = iter(self.engine.generate(able, **options) if able else [])
        return [ids if isinstance(ids, Skipped) else Generations(ids, next(answers)) for ids in prompts]

    def prompt_ids(self, prompt: Any, answer: int = 1) -> list[int] | Skipped:
        """Return the token ids of a prompt that leaves room for an answer of so many tokens."""
        try:
            ids = self.chat.prompt_ids(prompt, self.config.max_model_len)
        except RowRejectedError as error:  # for instance a system turn, which some templates refuse
            return Skipped(str(error))
        return ids if fits_context(ids, self.config, answer) else Skipped(TOO_LONG)


class VllmEngine:
    """Engine of vLLM in this process."""

    def __init__(self, path: str, config: EngineConfig, chat: ChatTokenizer) -> None:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, round(config.memory_gib))))
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        from vllm import LLM

        stored_tensors(path)
        check_finite(path)
        self.chat = chat
        # If vLLM 0.32's CPU build splits the prompt of a seeded request, it rewinds the random generator, which fails
        # on a CPU; without chunked prefill no prompt is split.
        hardware: dict[str, Any] = {"enforce_eager": True, "enable_chunked_prefill": False}
        if torch.cuda.is_available():
            gpus = config.gpus or 1.0
            hardware = {"tensor_parallel_size": max(1, int(gpus)), "gpu_memory_utilization": 0.9 * min(1.0, gpus)}
        options: dict[str, Any] = {"enable_prefix_caching": True, "load_format": "safetensors", "seed": 0}
        options |= {"dtype": config.dtype, "max_model_len": config.max_model_len} | hardware
        self.folder = tempfile.TemporaryDirectory()  # vLLM would fail on values that transformers refuses
        if settings := generation_settings(path):
            settings.save_pretrained(self.folder.name)
            options["generation_config"] = self.folder.name
        options |= config.arguments
        self.llm = LLM(model=path, **options)
        self.longest = config.max_model_len - 1  # scoring a text generates one token more

    def generate(
        self, prompts: Sequence[list[int]], *, n: int, temperature: float, max_tokens: int, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        from vllm import SamplingParams, TokensPrompt

        parameters = [
            SamplingParams(
                n=n,
                temperature=temperature,
                max_tokens=min(max_tokens, self.longest - len(ids)),
                seed=seed,
                logprobs=0,
                stop_token_ids=self.chat.stop_ids,
                detokenize=False,
            )
            for ids, seed in zip(prompts, seeds, strict=True)
        ]
        inputs = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
        outputs = self.llm.generate(inputs, parameters, use_tqdm=False)
        return [[self._completion(c) for c in sorted(o.outputs, key=lambda c: c.index)] for o in outputs]

    def _completion(self, output: Any) -> Completion:
        ids = list(output.token_ids)
        finished = output.finish_reason == "stop"
        return Completion(self.chat.decode(ids), output.cumulative_logprob, len(ids), finished, tuple(ids))

    def score(self, rows: Sequence[TokenRow]) -> list[Likelihood]:
        from vllm import SamplingParams, TokensPrompt

        texts = [[*prompt, *completion] for prompt, completion in rows]
        parameters = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        outputs = self.llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in texts], parameters, use_tqdm=False)
        found = []
        for (prompt, _), ids, output in zip(rows, texts, outputs, strict=True):
            positions: Any = output.prompt_logprobs
            tokens = [positions[i][ids[i]] for i in range(len(prompt), len(ids))]
            found.append(Likelihood(sum(t.logprob for t in tokens), all(t.rank == 1 for t in tokens)))
        return found

    def close(self) -> None:
        # Each checkpoint gets a new engine: on CPU, reloading weights into a running one silently keeps the old ones.
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class TransformersEngine:
    """Engine of transformers in this process."""

    def __init__(self, path: str, config: EngineConfig, chat: ChatTokenizer) -> None:
        self.chat = chat
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = load_model(path, config.dtype).to(self.device).eval()
        self.limit = config.max_model_len

    def generate(
        self, prompts: Sequence[list[int]], *, n: int, temperature: float, max_tokens: int, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        by_room: dict[int, list[int]] = {}
        for i, prompt in enumerate(prompts):  # a long prompt must not shorten the answers to others
            by_room.setdefault(min(max_tokens, self.limit - 1 - len(prompt)), []).append(i)
        found: dict[int, list[Completion]] = {}
        for room, numbers in by_room.items():
            part = [prompts[i] for i in numbers]
            found |= zip(numbers, self._generate(part, n, temperature, room, seeds[numbers[0]]), strict=True)
        return [found[i] for i in range(len(prompts))]

    @torch.inference_mode()
    def _generate(
        self, prompts: Sequence[list[int]], n: int, temperature: float, room: int, seed: int
    ) -> list[list[Completion]]:
        torch.manual_seed(seed)
        options = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        settings = GenerationConfig(
            max_new_tokens=room,
            num_return_sequences=n,
            eos_token_id=self.chat.stop_ids,
            pad_token_id=self.chat.pad_id,
            **options,
        )
        flat = generate(self.model, self.chat, prompts, self.device, generation_config=settings)
        batch = self._batch([(prompts[i // n], answer) for i, answer in enumerate(flat)])
        logps, _ = completion_logps(self.model, **batch)
        done = [
            Completion(self.chat.decode(answer), logp, len(answer), answer[-1] in self.chat.stop_ids, tuple(answer))
            for answer, logp in zip(flat, logps.tolist(), strict=True)
        ]
        return [done[i : i + n] for i in range(0, len(done), n)]

    def _batch(self, rows: Sequence[TokenRow]) -> dict[str, Any]:
        return {key: value.to(self.device) for key, value in collate(rows, self.chat.pad_id).items()}

    @torch.inference_mode()
    def score(self, rows: Sequence[TokenRow]) -> list[Likelihood]:
        found: list[Likelihood] = []
        size = rows_at_once(self.limit)
        for part in (rows[start : start + size] for start in range(0, len(rows), size)):
            batch = self._batch(part)
            logps, _ = completion_logps(self.model, **batch)
            logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            labels = batch["labels"][:, 1:]
            greedy = ((logits[:, :-1].argmax(dim=-1) == labels) | (labels == IGNORE)).all(dim=1)
            found += [Likelihood(*pair) for pair in zip(logps.tolist(), greedy.tolist(), strict=True)]
        return found

    def close(self) -> None:
        del self.model


ENGINES = {"vllm": VllmEngine, "transformers": TransformersEngine}
