"""A server that speaks OpenAI's chat completions: a real one, whose answers a test makes up."""

import json
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ChatServer:
    """Answers each request with ``answer(body)``: a list of choices; or trouble: an HTTP status, ``"close"``, ``bytes``
    that are no JSON, a float of seconds to keep silent, or a function that writes to the handler's connection."""

    def __init__(self, answer, port=0):
        self.answer = answer
        self.retry_after = "0"
        self.requests = []
        """(path, headers, body)."""
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                owner.respond(self)

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def respond(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        self.requests.append((handler.path, {key.lower(): value for key, value in handler.headers.items()}, body))
        found = self.answer(body)
        if isinstance(found, float):
            time.sleep(found)
            found = "close"
        if callable(found):
            with suppress(OSError):  # the client has gone
                found(handler.wfile)
            found = "close"
        if found == "close":
            handler.connection.close()
            return
        status, content = (found, {"error": {"message": "no"}}) if isinstance(found, int) else (200, None)
        usage = {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101}
        head = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"]}
        content = content or (None if isinstance(found, bytes) else head | {"choices": found, "usage": usage})
        data = found if isinstance(found, bytes) else json.dumps(content).encode()
        try:
            handler.send_response(status)
            handler.send_header("Content-Type", "application/json")
            handler.send_header("Retry-After", self.retry_after)
            handler.send_header("Content-Length", str(len(data)))
            handler.end_headers()
            handler.wfile.write(data)
        except OSError:  # the client has gone
            pass

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()


def choice(text, logprobs=None, index=0, finish="stop"):
    """A choice; ``logprobs`` is its list of tokens with what the API tells of them."""
    message = {"role": "assistant", "content": text}
    content = None if logprobs is None else {"content": logprobs}
    return {"index": index, "finish_reason": finish, "message": message, "logprobs": content}


def answers_of(source, key=None):
    """Answers of the endpoint that a source names."""
    from spo_ray.model.endpoint import EndpointAnswers

    return EndpointAnswers(key, str(source.model.path), source.engine, source.sampling)
