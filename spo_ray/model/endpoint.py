"""Client of OpenAI-compatible chat completion servers, and sampling from them."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import httpx
import openai

from spo_ray.config.data import EndpointConfig, SamplingConfig
from spo_ray.errors import UserError
from spo_ray.model.completion import HIGHEST_LOGP, Completion, Generations, Skipped, valid_text

REFUSED = (openai.BadRequestError, openai.UnprocessableEntityError)
"""Errors of one request alone, such as a prompt that is too long."""
LOCKED_OUT = (openai.AuthenticationError, openai.NotFoundError)
"""Errors that every other request would get too."""
LARGEST_RESPONSE = 64 * 2**20
"""Most bytes of a response's body, decompressed."""
ENCODINGS = ("", "identity", "gzip", "deflate")
"""Content encodings of responses; others, and several in a row, can expand a few bytes to gigabytes."""


class InvalidResponseError(openai.OpenAIError):
    """A server's response is not a chat completion."""


class BoundedClient(openai.DefaultAsyncHttpxClient):
    """HTTP client with a limit on the time and the size of a whole exchange; it follows no redirect to another host.

    The timeouts of HTTP clients are for one read each, so a server that sends a byte now and then never exceeds them.

    Args:
        seconds: limit of each exchange, from the first byte of the request to the last one of the response.
        before: awaited before each exchange; not part of the time.
    """

    def __init__(self, seconds: float, before: Callable[[], Awaitable[None]]) -> None:
        super().__init__(event_hooks={"response": [_stay_on_host]}, headers={"Accept-Encoding": "gzip"})
        self.seconds, self.before = seconds, before

    async def send(self, request: Any, *, stream: bool = True, **options: Any) -> Any:
        """Return the response with its whole body, whether or not ``stream`` is set.

        Raises:
            httpx.ReadTimeout: the exchange takes too long.
            InvalidResponseError: the body is too large or encoded otherwise, or a redirect leads to another host.
        """
        await self.before()
        try:
            async with asyncio.timeout(self.seconds):
                response = await super().send(request, stream=True, **options)
                try:
                    return await _read(response)
                finally:
                    await response.aclose()
                    self.cookies.clear()  # else they would grow, and be sent with every request
        except TimeoutError as error:
            raise httpx.ReadTimeout(f"no whole response in {self.seconds:g} s") from error


async def _stay_on_host(response: Any) -> None:
    """Raise InvalidResponseError if a response redirects to another host, or from https to http."""
    here = response.request.url
    there = here.join(response.headers["location"]) if response.has_redirect_location else here
    if there.host != here.host or (here.scheme, there.scheme) == ("https", "http"):
        raise InvalidResponseError(f"a redirect to {there.scheme}://{there.host}, which is not followed")


async def _read(response: Any) -> Any:
    """Return a copy of a streamed response with its body."""
    if (encoding := response.headers.get("content-encoding", "").lower()) not in ENCODINGS:
        raise InvalidResponseError(f"an answer in the encoding {encoding[:40]!r}")
    body = bytearray()
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > LARGEST_RESPONSE:
            raise InvalidResponseError(f"an answer of more than {LARGEST_RESPONSE >> 20} MiB")
    headers = [(name, value) for name, value in response.headers.multi_items() if name.lower() != "content-encoding"]
    kept = {"headers": headers, "request": response.request, "extensions": response.extensions}
    return type(response)(response.status_code, content=bytes(body), **kept)


class ChatClient:
    """Sends requests to one server, with limits on concurrent requests and on requests per minute.

    The openai client repeats failed requests, and waits as long as the server's Retry-After header says. A repetition
    counts towards the rate limit like any other request.

    Use it as an asynchronous context manager within one event loop.
    """

    def __init__(self, config: EndpointConfig, key: str | None, per_minute: float | None = None) -> None:
        self.concurrent = asyncio.Semaphore(config.concurrency)
        self.interval = 60.0 / per_minute if per_minute else 0.0
        self.next_start = 0.0
        self.client = openai.AsyncOpenAI(
            base_url=config.url,
            # The client wants one; servers without keys ignore it. One from a file may end in a line break.
            api_key=(key or "").strip() or "none",
            timeout=config.timeout_s,
            max_retries=config.retries,
            http_client=BoundedClient(config.timeout_s, self._wait_for_turn),
        )
        self.config = config
        self.logprobs: bool | None = None
        """True if the server returns log-probabilities; None: unknown."""
        self.accepted = False
        """True once the server has answered a request, so that it can't be the settings that it refuses."""
        self.checking = asyncio.Lock()

    async def __aenter__(self) -> "ChatClient":
        await self.client.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self.client.__aexit__(*error)

    async def ask(self, logprobs: dict[str, Any], **request: Any) -> Any:
        """Return a chat completion, requested with the fields of ``logprobs`` if the server accepts them.

        Raises:
            openai.OpenAIError: after all retries, or :class:`InvalidResponseError`.
            UserError: the server refuses the settings of the requests, whatever they ask.
        """
        async with self.concurrent:
            try:
                return await self._ask(logprobs, request)
            except REFUSED:
                await self._check_settings(request)
                raise

    async def _ask(self, logprobs: dict[str, Any], request: dict[str, Any]) -> Any:
        if self.logprobs is False or not logprobs:
            return await self._send(request)
        try:
            answer = await self._send(request | logprobs)
            self.logprobs = True
        except REFUSED:
            if self.logprobs:  # the server accepts them in other requests
                raise
            answer = await self._send(request)
            self.logprobs = bool(self.logprobs)  # a request at the same time may have shown that it does
        return answer

    async def _check_settings(self, request: dict[str, Any]) -> None:
        """Send the settings of a refused request with a short prompt, unless a request was accepted before.

        Raises:
            UserError: they are refused again, as every other request would be.
        """
        async with self.checking:
            if self.accepted:
                return
            try:
                await self._send(request | {"messages": [{"role": "user", "content": "Say yes."}]})
            except REFUSED as error:
                raise UserError(
                    f"{self.config.url} refuses every request ({error.status_code}: {str(error)[:300]}): change the "
                    "requests by engine.request, such as {max_completion_tokens: 4000, temperature: null}"
                ) from error
            except openai.OpenAIError:
                return

    async def _send(self, request: dict[str, Any]) -> Any:
        own = self.config.request
        replaced = own.keys() | ({"max_tokens"} if "max_completion_tokens" in own else set())
        request = {name: value for name, value in request.items() if name not in replaced}
        more = {name: value for name, value in own.items() if value is not None}
        try:
            raw = await self.client.chat.completions.with_raw_response.create(**request, extra_body=more)
            self.accepted = True
            # Counted before the client makes objects of them, during which no other request proceeds.
            if (count := len(raw.http_response.json().get("choices") or ())) > (asked := (request | more).get("n", 1)):
                raise InvalidResponseError(f"an answer with {count} choices, of {asked} requested")
            answer: Any = raw.parse()
            if answer.choices and all(choice.message for choice in answer.choices):
                return answer
        except openai.OpenAIError:
            raise
        except Exception as error:  # whatever the client stumbles over, such as a page of HTML or lists 10,000 deep
            raise InvalidResponseError(f"an answer that is no chat completion ({error})") from error
        raise InvalidResponseError("an answer without choices")

    async def _wait_for_turn(self) -> None:
        """Space requests evenly; the HTTP client awaits this before each request, repetitions included."""
        if self.interval:
            now = time.monotonic()
            start = max(self.next_start, now)
            self.next_start = start + self.interval
            await asyncio.sleep(start - now)


class EndpointAnswers:
    """Samples answers from a teacher behind an endpoint.

    Raises:
        RuntimeError: the server can't be reached after all retries, rejects the key, or does not know the model.
        UserError: the server refuses the settings of every request.
    """

    def __init__(self, key: str | None, model: str, config: EndpointConfig, sampling: SamplingConfig) -> None:
        self.key, self.model, self.config, self.sampling = key, model, config, sampling
        self.logprobs: bool | None = None

    def __call__(self, asked: Sequence[tuple[str, int]]) -> list[Generations | Skipped]:
        """Return the answers to each (prompt, seed)."""
        return asyncio.run(self._all(asked))

    async def _all(self, asked: Sequence[tuple[str, int]]) -> list[Generations | Skipped]:
        async with ChatClient(self.config, self.key) as client:
            client.logprobs = self.logprobs
            found = await asyncio.gather(*(self._one(client, *question) for question in asked))
            self.logprobs = client.logprobs
            return list(found)

    async def _one(self, client: ChatClient, prompt: str, seed: int) -> Generations | Skipped:
        try:
            settings = self.sampling.model_dump(include={"temperature", "max_tokens"}) | {"n": self.sampling.samples}
            messages = [{"role": "user", "content": prompt}]
            response = await client.ask({"logprobs": True}, model=self.model, messages=messages, seed=seed, **settings)
            return Generations([], [_completion(choice) for choice in response.choices])
        except InvalidResponseError as error:
            return Skipped(valid_text(f"the endpoint gave {str(error)[:200]}"))
        except openai.OpenAIError as error:
            if not isinstance(error, openai.APIStatusError) or isinstance(error, LOCKED_OUT):
                raise RuntimeError(f"{self.config.url}: {type(error).__name__}: {error}") from error
            how = "refused" if error.status_code < 500 else "failed at"
            return Skipped(valid_text(f"the endpoint {how} the request ({error.status_code}: {str(error)[:200]})"))


def _completion(choice: Any) -> Completion:
    """Return a choice with its log-probability and token count if the server sent them.

    Raises:
        InvalidResponseError: it has another form.
    """
    try:
        content = choice.logprobs.content if choice.logprobs else None
        logp = sum(map(logprob_of, content)) if content else None
        text = valid_text(choice.message.content)
        return Completion(text, logp, len(content or ()), choice.finish_reason == "stop")
    except (AttributeError, TypeError, ValueError) as error:
        raise InvalidResponseError(f"an answer that is no chat completion ({error})") from error


def logprob_of(token: Any) -> float:
    """Return a token's log-probability.

    Raises:
        ValueError: it is none, such as NaN or 3.
    """
    value = float(token.logprob)
    if not value <= HIGHEST_LOGP:
        raise ValueError(f"a log-probability of {value}")
    return value
