"""Servers with OpenAI's chat completions, and samples from them."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import openai

from spo_ray.data.completion import Answers, Completion
from spo_ray.data.sample import Source
from spo_ray.data_config import EndpointConfig

REFUSED = (openai.BadRequestError, openai.UnprocessableEntityError)
"""Errors of one request alone: a prompt that is too long, for instance."""


class NonsenseError(openai.OpenAIError):
    """A server answered, but not with a chat completion."""


class ChatClient:
    """Requests to one server, so many at a time and a minute, repeated after growing pauses where they fail.

    Use it as an asynchronous context, inside one event loop.
    """

    def __init__(self, config: EndpointConfig, key: str | None, per_minute: float | None = None) -> None:
        self.limit = asyncio.Semaphore(config.concurrency)
        self.pause = 60.0 / per_minute if per_minute else 0.0
        self.next = 0.0
        self.client = openai.AsyncOpenAI(
            base_url=config.url,
            api_key=key or "none",  # servers without keys take any
            timeout=config.timeout_s,
            max_retries=config.retries,
        )
        self.logprobs: bool | None = None
        """Whether the server gives log-probabilities; None: unknown."""

    async def __aenter__(self) -> "ChatClient":
        await self.client.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self.client.__aexit__(*error)

    async def ask(self, logprobs: dict[str, Any], **request: Any) -> Any:
        """A chat completion, with ``logprobs``' fields where the server takes them.

        Raises:
            openai.OpenAIError: after all retries, or :class:`NonsenseError`.
        """
        async with self.limit:
            if self.logprobs is False or not logprobs:
                return await self._send(request)
            try:
                answer = await self._send(request | logprobs)
                self.logprobs = True
            except REFUSED:
                if self.logprobs:  # it gives them to others
                    raise
                answer = await self._send(request)
                self.logprobs = False if self.logprobs is None else self.logprobs
            return answer

    async def _send(self, request: dict[str, Any]) -> Any:
        await self._turn()
        try:
            answer: Any = await self.client.chat.completions.create(**request)
            if answer.choices and all(choice.message for choice in answer.choices):
                return answer
        except (ValueError, AttributeError, TypeError) as error:  # what the client makes of a page of HTML
            raise NonsenseError(f"an answer that is no chat completion ({error})") from error
        raise NonsenseError("an answer without choices")

    async def _turn(self) -> None:
        """Wait for the next place in an even flow of requests."""
        if self.pause:
            now = time.monotonic()
            self.next = max(self.next, now) + self.pause
            await asyncio.sleep(self.next - self.pause - now)


class EndpointAnswers:
    """Answers of a teacher.

    Raises:
        RuntimeError: the server can't be reached, or lets nobody in, after all retries.
    """

    def __init__(self, key: str | None, source: Source) -> None:
        config: Any = source.engine
        self.model, self.config, self.sampling = str(source.model.path), config, source.sampling
        self.key = key
        self.logprobs: bool | None = None

    def __call__(self, asked: Sequence[tuple[str, int]]) -> list[Answers | str]:
        return asyncio.run(self._all(asked))

    async def _all(self, asked: Sequence[tuple[str, int]]) -> list[Answers | str]:
        async with ChatClient(self.config, self.key) as client:
            client.logprobs = self.logprobs
            found = await asyncio.gather(*(self._one(client, *question) for question in asked))
            self.logprobs = client.logprobs
            return list(found)

    async def _one(self, client: ChatClient, prompt: str, seed: int) -> Answers | str:
        try:
            response = await client.ask(
                {"logprobs": True},
                model=self.model,
                messages=[{"role": "user", "content": prompt}],
                n=self.sampling.samples,
                temperature=self.sampling.temperature,
                max_tokens=self.sampling.max_tokens,
                seed=seed,
            )
        except REFUSED as error:
            return f"the endpoint refused the request ({error.status_code}: {str(error)[:200]})"
        except openai.OpenAIError as error:
            raise RuntimeError(f"{self.config.url}: {type(error).__name__}: {error}") from error
        return Answers([], [_completion(choice) for choice in response.choices])


def _completion(choice: Any) -> Completion:
    """Log-probabilities and token counts where the server tells them."""
    content = choice.logprobs.content if choice.logprobs else None
    logp = sum(token.logprob for token in content) if content else None
    return Completion(choice.message.content or "", logp, len(content or ()), choice.finish_reason == "stop")
