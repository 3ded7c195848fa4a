"""Servers with OpenAI's chat completions, and samples from them."""

import asyncio
import random
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import openai

from spo_ray.config.data import EndpointConfig, SamplingConfig
from spo_ray.model.completion import Completion, Generations, Skipped

REFUSED = (openai.BadRequestError, openai.UnprocessableEntityError)
"""Errors of one request alone: a prompt that is too long, for instance."""
LOCKED_OUT = (openai.AuthenticationError, openai.NotFoundError)
"""Errors that every other request would meet too."""
PASSING = (408, 409, 429)
"""Answers after which a repetition may help, as after all from 500 on."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
LONGEST_WISH_S = 120.0
"""A server that asks for more patience than this is asked again nevertheless."""


class NonsenseError(openai.OpenAIError):
    """A server answered, but not with a chat completion."""


class ChatClient:
    """Requests to one server, so many at a time and a minute, repeated after growing pauses where they fail.

    A repetition is a request like any other, and waits for its turn.

    Use it as an asynchronous context, inside one event loop.
    """

    def __init__(self, config: EndpointConfig, key: str | None, per_minute: float | None = None) -> None:
        self.limit = asyncio.Semaphore(config.concurrency)
        self.pause = 60.0 / per_minute if per_minute else 0.0
        self.next = 0.0
        self.retries = config.retries
        self.client = openai.AsyncOpenAI(
            base_url=config.url,
            api_key=key or "none",  # servers without keys take any
            timeout=config.timeout_s,
            max_retries=0,  # its own repetitions would jump the queue
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
        for tried in range(self.retries):
            try:
                return await self._send_once(request)
            except (openai.APIConnectionError, openai.APIStatusError) as error:
                if not _may_pass(error):
                    raise
                await asyncio.sleep(_pause(error, tried))
        return await self._send_once(request)

    async def _send_once(self, request: dict[str, Any]) -> Any:
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


def _may_pass(error: openai.APIConnectionError | openai.APIStatusError) -> bool:
    if isinstance(error, openai.APIConnectionError):
        return True
    said = error.response.headers.get("x-should-retry")
    return said == "true" if said in ("true", "false") else error.status_code in PASSING or error.status_code >= 500


def _pause(error: openai.APIConnectionError | openai.APIStatusError, tried: int) -> float:
    """Seconds until the next try: what the server wishes, else twice as many each time, somewhat by chance."""
    wish = _wish(error.response.headers.get("retry-after", "")) if isinstance(error, openai.APIStatusError) else 0.0
    if wish > 0:
        return min(wish, LONGEST_WISH_S)
    return min(FIRST_PAUSE_S * 2 ** min(tried, 99), LONGEST_PAUSE_S) * random.uniform(0.5, 1.0)


def _wish(header: str) -> float:
    """The seconds in a Retry-After, which may be a date; 0 where there is none."""
    with suppress(ValueError):
        return float(header)
    with suppress(ValueError, TypeError):  # the latter: a date without a time zone
        return (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds()
    return 0.0


class EndpointAnswers:
    """Answers of a teacher; a question that gets none has the reason.

    Raises:
        RuntimeError: the server can't be reached after all retries, lets nobody in, or does not know the model.
    """

    def __init__(self, key: str | None, model: str, config: EndpointConfig, sampling: SamplingConfig) -> None:
        self.model, self.config, self.sampling = model, config, sampling
        self.key = key
        self.logprobs: bool | None = None

    def __call__(self, asked: Sequence[tuple[str, int]]) -> list[Generations | Skipped]:
        return asyncio.run(self._all(asked))

    async def _all(self, asked: Sequence[tuple[str, int]]) -> list[Generations | Skipped]:
        async with ChatClient(self.config, self.key) as client:
            client.logprobs = self.logprobs
            found = await asyncio.gather(*(self._one(client, *question) for question in asked))
            self.logprobs = client.logprobs
            return list(found)

    async def _one(self, client: ChatClient, prompt: str, seed: int) -> Generations | Skipped:
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
            return Generations([], [_completion(choice) for choice in response.choices])
        except NonsenseError as error:
            return Skipped(f"the endpoint gave {str(error)[:200]}")
        except openai.APIStatusError as error:
            if isinstance(error, LOCKED_OUT):
                raise RuntimeError(f"{self.config.url}: {type(error).__name__}: {error}") from error
            how = "refused" if error.status_code < 500 else "failed at"
            return Skipped(f"the endpoint {how} the request ({error.status_code}: {str(error)[:200]})")
        except openai.OpenAIError as error:
            raise RuntimeError(f"{self.config.url}: {type(error).__name__}: {error}") from error


def _completion(choice: Any) -> Completion:
    """Log-probabilities and token counts where the server tells them.

    Raises:
        NonsenseError: it is no answer.
    """
    try:
        content = choice.logprobs.content if choice.logprobs else None
        logp = sum(float(token.logprob) for token in content) if content else None
        text = choice.message.content or ""
        if not isinstance(text, str):
            raise TypeError("its content is no text")
        return Completion(text, logp, len(content or ()), choice.finish_reason == "stop")
    except (AttributeError, TypeError, ValueError) as error:
        raise NonsenseError(f"an answer that is no chat completion ({error})") from error
