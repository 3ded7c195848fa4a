"""Samples from a server with OpenAI's chat completions."""

import asyncio
from collections.abc import Sequence
from typing import Any

import openai

from spo_ray.data.completion import Answers, Completion
from spo_ray.data.sample import Source

REFUSED = (openai.BadRequestError, openai.UnprocessableEntityError)
"""Errors of one request alone: a prompt that is too long, for instance."""


class EndpointAnswers:
    """Answers over HTTP: failed, refused and timed out requests are repeated after growing pauses.

    Raises:
        RuntimeError: the server can't be reached, or lets nobody in, after all retries.
    """

    def __init__(self, key: str | None, source: Source) -> None:
        config: Any = source.engine
        self.model, self.config, self.sampling = str(source.model.path), config, source.sampling
        self.key = key or "none"  # servers without keys take any
        self.logprobs: dict[str, bool] = {"logprobs": True}

    def __call__(self, asked: Sequence[tuple[str, int]]) -> list[Answers | str]:
        return asyncio.run(self._all(asked))

    async def _all(self, asked: Sequence[tuple[str, int]]) -> list[Answers | str]:
        limit = asyncio.Semaphore(self.config.concurrency)
        async with openai.AsyncOpenAI(
            base_url=self.config.url,
            api_key=self.key,
            timeout=self.config.timeout_s,
            max_retries=self.config.retries,
        ) as client:
            return list(await asyncio.gather(*(self._one(client, limit, *question) for question in asked)))

    async def _one(self, client: Any, limit: asyncio.Semaphore, prompt: str, seed: int) -> Answers | str:
        async with limit:
            try:
                try:
                    response = await self._ask(client, prompt, seed, self.logprobs)
                except REFUSED:
                    response = await self._ask(client, prompt, seed, {})  # some models give no log-probabilities
                    self.logprobs = {}
            except REFUSED as error:
                return f"the endpoint refused the request ({error.status_code}: {str(error)[:200]})"
            except openai.OpenAIError as error:
                raise RuntimeError(f"{self.config.url}: {type(error).__name__}: {error}") from error
        return Answers([], [_completion(choice) for choice in response.choices])

    async def _ask(self, client: Any, prompt: str, seed: int, more: Any) -> Any:
        return await client.chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": prompt}],
            n=self.sampling.samples,
            temperature=self.sampling.temperature,
            max_tokens=self.sampling.max_tokens,
            seed=seed,
            **more,
        )


def _completion(choice: Any) -> Completion:
    """Log-probabilities and token counts where the server tells them."""
    content = choice.logprobs.content if choice.logprobs else None
    logp = sum(token.logprob for token in content) if content else None
    return Completion(choice.message.content or "", logp, len(content or ()), choice.finish_reason == "stop")
