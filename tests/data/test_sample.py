"""Sampling that is interrupted, and sampling over HTTP."""

import json
import os
import subprocess
import sys
import time
import zlib
from collections import Counter
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import partial

import psutil
import pytest

from spo_ray.config.data import EndpointConfig, SamplingConfig, TeacherModel
from spo_ray.data.sample import SamplingJob, _Sampler, sample
from spo_ray.data.sft_set import teacher_groups
from spo_ray.errors import UserError
from spo_ray.model.completion import Skipped
from spo_ray.runtime import schema
from spo_ray.runtime.artifact import Artifact, write_rows
from spo_ray.runtime.run import Run

from ..chat_server import ChatServer, answers_of, choice
from ..conftest import ROOT
from ..helpers import small_config

DEADLINE_S = 400


def start(folder, questions):
    command = [sys.executable, "-m", "tests.data.sampling", str(folder), str(questions)]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    with (folder / "output.txt").open("a") as output:
        return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment)


def wait_for_parts(folder, count):
    scratch = folder / "quickstart" / ".unfinished" / "base_samples"
    end = time.time() + DEADLINE_S
    while time.time() < end:
        found = sorted(scratch.glob("part-*.parquet"))
        if len(found) >= count:
            return found
        time.sleep(0.05)
    raise AssertionError((folder / "output.txt").read_text()[-3000:])


def engines(process):
    """The actors that hold an engine."""
    family = psutil.Process(process.pid).children(recursive=True)
    return [p for p in family if "MapWorker" in " ".join(p.cmdline())]


@pytest.mark.slow
def test_killed_engines_and_a_killed_driver_lose_and_repeat_nothing(tmp_path):
    """256 questions with 8 samples each; an engine is killed twice, the driver once, then the same command again."""
    process = start(tmp_path, 256)
    for parts in (2, 5):
        wait_for_parts(tmp_path, parts)
        (engine,) = engines(process)
        engine.kill()
        wait_for_parts(tmp_path, parts + 1)
    done = wait_for_parts(tmp_path, 8)
    process.kill()
    process.wait()
    times = {part.name: part.stat().st_mtime_ns for part in done}
    again = start(tmp_path, 256)
    assert again.wait(DEADLINE_S) == 0, (tmp_path / "output.txt").read_text()[-3000:]
    output = (tmp_path / "output.txt").read_text()
    assert "base_samples: resume" in output
    final = tmp_path / "quickstart" / "base_samples"
    assert {name: (final / name).stat().st_mtime_ns for name in times} == times
    table = Artifact(final, "").rows()
    assert Counter(row["id"] for row in table) == Counter(f"train-{i:06d}" for i in range(256))
    assert all(len(row["samples"]) == 8 for row in table)
    counts = json.loads((final / "manifest.json").read_text())["rows"]
    assert (counts["read"], counts["kept"]) == (256, 256)
    short = tmp_path / "uninterrupted"
    short.mkdir()
    assert start(short, 64).wait(DEADLINE_S) == 0
    assert Artifact(short / "quickstart" / "base_samples", "").rows() == table[:64]


class Teacher(ChatServer):
    """Repeats the question, after the trouble that the test scripts."""

    def __init__(self):
        super().__init__(self.say)
        self.script = []

    def say(self, body):
        question = body["messages"][0]["content"]
        if self.script:
            trouble = self.script.pop(0)
            if trouble:
                return trouble
        if "too long" in question:
            return 400
        tokens = [{"token": "a", "logprob": -0.5, "top_logprobs": []}] * 3
        return [
            choice(f"{question} {body['seed']} {i}", tokens, i, "stop" if i else "length") for i in range(body["n"])
        ]


@pytest.fixture
def teacher():
    with Teacher() as server:
        yield server


@pytest.fixture
def endpoint(teacher):
    return teacher.url


def served(url, **options):
    config = EndpointConfig(type="endpoint", url=url, **options)
    return SamplingJob(Artifact("teacher", "t"), config, SamplingConfig(samples=2, temperature=0.6, max_tokens=9))


def test_an_endpoint_answers_after_refusals(teacher, endpoint):
    teacher.script = [429, 500, "close"]
    answers = answers_of(served(endpoint, concurrency=1), "secret")([("2 + 2?", 7), ("too long", 8)])
    assert answers[1].reason.startswith("the endpoint refused the request (400")
    assert answers[0].prompt_ids == []
    assert [c.text for c in answers[0].completions] == ["2 + 2? 7 0", "2 + 2? 7 1"]
    assert [c.finished for c in answers[0].completions] == [False, True]
    assert [(c.logp, c.tokens) for c in answers[0].completions] == [(-1.5, 3)] * 2
    path, headers, body = teacher.requests[-1]
    assert (path, headers["authorization"]) == ("/v1/chat/completions", "Bearer secret")
    assert {key: body[key] for key in ("model", "n", "temperature", "max_tokens")} == {
        "model": "teacher",
        "n": 2,
        "temperature": 0.6,
        "max_tokens": 9,
    }
    assert [body.get("logprobs") for _, _, body in teacher.requests] == [True] * 5  # a refusal of one among others


def test_an_endpoint_without_log_probabilities(teacher, endpoint):
    teacher.script = [400]
    answer = answers_of(served(endpoint))
    (found,) = answer([("2 + 2?", 7)])
    assert [c.text for c in found.completions] == ["2 + 2? 7 0", "2 + 2? 7 1"]
    answer([("3 + 3?", 7)])
    assert [body.get("logprobs") for _, _, body in teacher.requests] == [True, None, None]


def test_an_endpoint_that_keeps_refusing_ends_the_stage(teacher, endpoint):
    teacher.script = [401]
    with pytest.raises(RuntimeError, match=r"127\.0\.0\.1.*AuthenticationError"):
        answers_of(served(endpoint))([("2 + 2?", 7)])
    teacher.script = [404]
    with pytest.raises(RuntimeError, match=r"127\.0\.0\.1.*NotFoundError"):
        answers_of(served(endpoint))([("2 + 2?", 7)])
    with pytest.raises(RuntimeError, match="APIConnectionError"):
        answers_of(served("http://127.0.0.1:9/v1", retries=0))([("2 + 2?", 7)])


NO_TEXT = b'{"choices": [{"message": {"content": ["a"]}, "finish_reason": "stop"}]}'


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        (b'{"choices": null}', "the endpoint gave an answer without choices"),
        (b'{"choices": [{"message": null}]}', "the endpoint gave an answer without choices"),
        (
            b'{"choices": [' + b'{"message": {"content": "a"}}, ' * 99_999 + b"{}]}",
            "the endpoint gave an answer with 100000 choices, of 2 requested",
        ),
        (b"<html>", "the endpoint gave an answer that is no chat completion"),
        (NO_TEXT, "the endpoint gave an answer that is no chat completion (its content is no text)"),
        (403, "the endpoint refused the request (403: "),
        (500, "the endpoint failed at the request (500: "),
        (429, "the endpoint refused the request (429: "),
    ],
)
def test_a_bad_answer_costs_one_question(teacher, endpoint, trouble, reason):
    teacher.script = [trouble] * (2 if trouble in (500, 429) else 1)
    config = served(endpoint, concurrency=1, retries=1)
    bad, good = answers_of(config)([("2 + 2?", 7), ("3 + 3?", 8)])
    assert bad.reason.startswith(reason)
    assert [c.text for c in good.completions] == ["3 + 3? 8 0", "3 + 3? 8 1"]


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


def drip(wire, data):
    for byte in data:
        wire.write(bytes([byte]))
        time.sleep(0.05)


def endless(wire):
    wire.write(HEAD + b"\r\n")
    while True:
        wire.write(b" " * 2**20)


def bomb(wire, size=2**27, encoding=b"gzip"):
    """A body of zeros, a thousandth of its size on the wire."""
    packer = zlib.compressobj(9, wbits=31)
    body = b"".join(packer.compress(bytes(2**20)) for _ in range(size >> 20)) + packer.flush()
    wire.write(HEAD + b"Content-Encoding: %b\r\nContent-Length: %d\r\n\r\n" % (encoding, len(body)) + body)


def elsewhere(wire):
    wire.write(b"HTTP/1.1 307 Elsewhere\r\nLocation: http://localhost:1/v1/chat/completions\r\n\r\n")


@pytest.mark.parametrize(
    ("attack", "reason"),
    [
        (endless, "an answer of more than 64 MiB"),
        (bomb, "an answer of more than 64 MiB"),
        (partial(bomb, size=2**20, encoding=b"gzip, gzip"), "an answer in the encoding 'gzip, gzip'"),
        (elsewhere, "a redirect to http://localhost, which is not followed"),
    ],
)
def test_a_hostile_server_costs_one_question(teacher, endpoint, attack, reason):
    teacher.script = [attack]
    bad, good = answers_of(served(endpoint, concurrency=1, retries=0))([("2 + 2?", 7), ("3 + 3?", 8)])
    assert bad.reason == f"the endpoint gave {reason}"
    assert [c.text for c in good.completions] == ["3 + 3? 8 0", "3 + 3? 8 1"]
    assert len(teacher.requests) == 2


def test_cookies_of_a_server_are_not_kept_and_a_keys_line_break_is_not_sent(teacher, endpoint):
    def baking(wire):
        wire.write(b"HTTP/1.1 500 No\r\nSet-Cookie: a=b\r\nContent-Length: 0\r\n\r\n")

    teacher.script = [baking]
    (answer,) = answers_of(served(endpoint, retries=1), "secret\n")([("2 + 2?", 7)])
    assert answer.completions[0].text == "2 + 2? 7 0"
    headers = [headers for _, headers, _ in teacher.requests]
    assert [h["authorization"] for h in headers] == ["Bearer secret"] * 2
    assert not [h for h in headers if "cookie" in h]


@pytest.mark.parametrize("head", [b"", HEAD + b"Content-Length: 1000\r\n\r\n"], ids=["header", "body"])
def test_the_time_limit_is_for_the_whole_response(teacher, endpoint, head):
    """A byte every 50 ms: no single read takes long."""
    teacher.script = [lambda wire: (wire.write(head), drip(wire, HEAD * 20))]
    before = time.monotonic()
    (answer,) = answers_of(served(endpoint, timeout_s=1.0, retries=1))([("2 + 2?", 7)])
    assert answer.completions[0].text == "2 + 2? 7 0"  # the second attempt
    assert 1.0 <= time.monotonic() - before < 8.0


def test_a_server_is_left_alone_as_long_as_it_wishes(teacher, endpoint):
    in_four_seconds = format_datetime(datetime.now(UTC) + timedelta(seconds=4), usegmt=True)
    for wish, seconds in (("1.5", 1.5), (in_four_seconds, 1.0)):  # a date has no fractions, and time has passed
        teacher.script, teacher.retry_after = [429], wish
        before = time.monotonic()
        (answer,) = answers_of(served(endpoint))([("2 + 2?", 7)])
        assert answer.completions[0].text == "2 + 2? 7 0"
        assert time.monotonic() - before >= seconds
    teacher.script, teacher.retry_after, teacher.requests = [429], "3600", []
    (answer,) = answers_of(served(endpoint))([("2 + 2?", 7)])  # longer than a run should wait
    assert answer.reason.startswith("the endpoint refused the request (429: ")
    assert len(teacher.requests) == 1


def test_a_teacher_is_asked_where_responses_lack(local_ray, in_root, tmp_path, teacher, endpoint, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", "hidden")
    (tmp_path / "in").mkdir()
    table = [
        {"id": str(i), "prompt": prompt, "gold": "#### 1", "responses": ["r"] * i, "response_sources": ["gold"] * i}
        for i, prompt in enumerate(["none", "one", "two"])
    ]
    write_rows(tmp_path / "in" / "part-0.parquet", table, schema.SftQuestion)
    engine = EndpointConfig(type="endpoint", url=endpoint, api_key_env="TEACHER_KEY")
    model = TeacherModel(model="r1", engine=engine, sampling=SamplingConfig(samples=2))
    run = Run(small_config(tmp_path, "sft_data.responses_per_question=2"))
    artifact = sample(run, "teacher1_samples", SamplingJob.teacher(run.config, model), Artifact(tmp_path / "in", "in"))
    found = {row["prompt"]: row for row in artifact.rows()}
    assert {name: len(row["samples"]) for name, row in found.items()} == {"none": 2, "one": 2, "two": 0}
    assert found["two"]["seed"] is None
    assert found["one"]["samples"][1] == f"one {found['one']['seed']} 1"
    assert found["one"]["responses"] == ["r"]
    assert all(headers["authorization"] == "Bearer hidden" for _, headers, _ in teacher.requests)
    assert "hidden" not in (artifact.path / "manifest.json").read_text()
    assert artifact.manifest["facts"] | {"asked": 2, "refused": {}} == artifact.manifest["facts"]


def test_a_teachers_refusals_are_counted_and_all_of_them_are_an_error(local_ray, in_root, tmp_path, endpoint):
    engine = EndpointConfig(type="endpoint", url=endpoint)
    teacher = TeacherModel(model="r1", engine=engine, sampling=SamplingConfig(samples=1))

    def ask(*prompts):
        folder = tmp_path / f"in{len(prompts)}"
        folder.mkdir()
        table = [{"id": p, "prompt": p, "gold": "#### 1", "responses": [], "response_sources": []} for p in prompts]
        write_rows(folder / "part-0.parquet", table, schema.SftQuestion)
        run = Run(small_config(tmp_path))
        return sample(run, "teacher1_samples", SamplingJob.teacher(run.config, teacher), Artifact(folder, folder.name))

    some = ask("fine", "too long")
    ((reason, count),) = some.manifest["facts"]["refused"].items()
    assert (reason[:39], count) == ("the endpoint refused the request (400: ", 1)
    assert [bool(row["refused"]) for row in some.rows()] == [False, True]
    with pytest.raises(UserError, match="teacher1_samples: the teacher answered none of 1 questions: the endpoint"):
        ask("too long")
    assert not list((tmp_path / "quickstart" / ".unfinished" / "teacher1_samples").glob("part-*"))


def test_teachers_are_grouped_behind_models():
    model = TeacherModel(model="m")
    assert teacher_groups(["samples", "gold"]) == [(None, ["samples", "gold"])]
    assert teacher_groups([model, "gold", model]) == [(None, []), (model, ["gold"]), (model, [])]


def test_the_seed_of_a_question_depends_on_nothing_else():
    seen = []

    def answer(asked):
        seen.append(dict(asked))
        return [Skipped("no")] * len(asked)

    source = SamplingJob(Artifact("m", "m"), EndpointConfig(type="endpoint", url="http://x/v1"), SamplingConfig())
    batch = [{"id": str(i), "prompt": f"p{i}"} for i in range(3)]
    for part in (batch, batch[1:]):
        kept, rejected = _Sampler(answer, source, "0:base")(part)
        assert not kept
        assert [row["reason"] for row in rejected] == ["no"] * len(part)
    _Sampler(answer, source, "1:base")(batch)
    assert seen[1] == {"p1": seen[0]["p1"], "p2": seen[0]["p2"]}
    assert len({*seen[0].values(), *seen[2].values()}) == 6
