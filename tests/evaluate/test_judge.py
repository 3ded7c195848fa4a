"""Judging against a baseline, with a judge at a real server that the tests script."""

import json
import math
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from spo_ray.config.evaluate import AlpacaConfig, AnnotatorConfig
from spo_ray.config.model import OWN_TEMPLATE
from spo_ray.errors import UserError
from spo_ray.evaluate import alpaca
from spo_ray.evaluate.judge import Reply, fill, read_template, read_verdict
from spo_ray.evaluate.suite import SuiteContext
from spo_ray.runtime import schema
from spo_ray.runtime.artifact import Artifact, write_rows
from spo_ray.runtime.run import Run

from ..chat_server import ChatServer, choice
from ..helpers import small_config

COUNT = 24
VERDICTS = [("m", 0.0), ("**M**", 1.0), ("m or M", None), ("", None), ("model", None), ("a\nM.\n", 1.0)]
VERDICTS += [("I'm sure M", 1.0), ("I’m for 'm'", 0.0)]
SURE = math.log(0.9), math.log(0.1)


class NoEvaluator:
    """Judges at endpoints need none."""

    def free_engines(self):
        pass


class Judge(ChatServer):
    """Finds that the output with ``new`` in it is better, with a probability of 0.9; ``trouble`` comes first."""

    def __init__(self, logprobs=True):
        super().__init__(self.judge)
        self.logprobs = logprobs
        self.trouble = {}
        """Instruction to a list of what goes wrong, one request after the other."""

    def judge(self, body):
        text, instruction = body["messages"][-1]["content"], number(body)
        if self.trouble.get(instruction):
            found = self.trouble[instruction].pop(0)
            return [choice(found)] if isinstance(found, str) and found != "close" else found
        best = "m" if text.index("new") < text.index("old") else "M"
        if not self.logprobs and "top_logprobs" in body:
            return 400
        if "top_logprobs" not in body:
            return [choice(best)]
        other = "M" if best == "m" else "m"
        top = [{"token": t, "logprob": p} for t, p in ((best, SURE[0]), (other, SURE[1]), ("The", -9.0))]
        return [choice(best, [{"token": best, "logprob": SURE[0], "top_logprobs": top}])]


def number(body):
    return re.search(r"do (\d+)", body["messages"][-1]["content"]).group(1)


def annotator(url, **options):
    engine = {"type": "endpoint", "url": url, "retries": 2, "timeout_s": 60.0, "concurrency": 8}
    return {"name": "j", "model": "judge", "engine": engine | options.pop("engine", {})} | options


def judged(folder, settings, **alpaca_options):
    """The stage's artifact, from outputs made up beforehand."""
    outputs = folder / "outputs"
    if not outputs.exists():
        outputs.mkdir()
        table = [
            {
                "id": f"{i:03d}",
                "checkpoint": "spo",
                "instruction": f"do {i}",
                "dataset": "d",
                "output": f"new {i}" + "!" * i,
            }
            | {"finished": True, "baseline_output": f"old {i}", "baseline": "base"}
            for i in range(COUNT)
        ]
        write_rows(outputs / "part-0.parquet", table, schema.Output)
    section = AlpacaConfig(annotators=[settings], **alpaca_options)
    config = small_config(folder / "runs")
    run = Run(config.model_copy(update={"eval": config.eval.model_copy(update={"alpaca": section})}))
    context = SuiteContext(run, Artifact(outputs, ""), NoEvaluator())
    found = alpaca.second_pass(context, {}, {"spo": Artifact(outputs, "outputs")})
    return found["spo"][0]


def preferences(artifact):
    return {row["id"]: row["preference"] for row in artifact.rows()}


@pytest.mark.parametrize("orders", ["random", "both"])
def test_weighted_preferences_do_not_depend_on_the_order(orders, in_root, tmp_path):
    with Judge() as judge:
        artifact = judged(tmp_path, annotator(judge.url, orders=orders))
    assert preferences(artifact) == {f"{i:03d}": pytest.approx(1.9) for i in range(COUNT)}
    first = Counter(order for row in artifact.rows() for order in row["checkpoint_first"])
    assert len(judge.requests) == sum(first.values()) == COUNT * (2 if orders == "both" else 1)
    assert min(first[True], first[False]) >= (COUNT if orders == "both" else COUNT // 4)
    _, headers, body = judge.requests[0]
    assert headers["authorization"] == "Bearer none"
    assert (body["model"], body["max_tokens"], body["temperature"], body["top_logprobs"]) == ("judge", 1, 0.0, 5)
    assert [turn["role"] for turn in body["messages"]] == ["system", "user"]
    records = json.loads((artifact.path / "annotations.json").read_text())
    assert records[3] == {
        "instruction": "do 3",
        "dataset": "d",
        "generator_1": "base",
        "output_1": "old 3",
        "generator_2": "spo",
        "output_2": "new 3!!!",
        "annotator": "j",
        "index": 3,
        "preference": pytest.approx(1.9),
    }


def test_a_judge_without_log_probabilities_is_read_by_its_words(in_root, tmp_path):
    with Judge(logprobs=False) as judge:
        artifact = judged(tmp_path, annotator(judge.url, engine={"concurrency": 1}))
    assert set(preferences(artifact).values()) == {2.0}
    assert sum("top_logprobs" in body for _, _, body in judge.requests) == 1


def test_a_judge_that_fails_in_every_way(in_root, tmp_path):
    """Everything is judged, or listed with its reason; the next try asks for what is missing, and for that alone."""
    with Judge() as judge:
        settings = annotator(judge.url, engine={"timeout_s": 4.0})
        passing = {"0": [500, 429], "1": ["close"], "2": [6.0]}  # mended by repetition
        lasting = {
            "3": [500] * 3,
            "4": ["close"] * 3,
            "5": [6.0] * 3,
            "6": ["I can't choose."],
            "7": [400],
            "8": [b"<html>"],
        }
        judge.trouble = passing | lasting | {"7": [400, 400]}
        with pytest.raises(UserError, match=r"j left 6 of 24 outputs of spo .*5 failed.*, 1 unpars.*asks again"):
            judged(tmp_path, settings)
        asked = len(judge.requests)
        judge.trouble = {"3": [500] * 3}
        artifact = judged(tmp_path, settings, max_unjudged=0.2)
        again = [
            re.search(r"do (\d+)", body["messages"][-1]["content"]).group(1) for _, _, body in judge.requests[asked:]
        ]
    # the nonsense of 6 is an answer that was paid for: it is not asked for again
    assert Counter(again) == {"3": 3, "4": 1, "5": 1, "7": 1, "8": 1}
    found = preferences(artifact)
    assert [key for key, value in found.items() if value is None] == ["003", "006"]
    assert [found[f"{i:03d}"] for i in (0, 1, 2, 4, 5, 7, 8)] == [pytest.approx(1.9)] * 7
    reasons = {row["id"]: row["reason"] for row in artifact.rows() if row["reason"]}
    assert reasons["003"].startswith("InternalServerError")
    assert reasons["006"].startswith("unparsable verdict: ")
    facts = artifact.manifest
    assert facts["rows"]["kept"] == COUNT - 2
    assert facts["rows"]["dropped"] == {"InternalServerError": 1, "unparsable verdict": 1}
    listed = json.loads((tmp_path / "runs" / "quickstart" / "unjudged_spo@j.json").read_text())
    assert [row["id"] for row in listed] == ["003", "004", "005", "006", "007", "008"]
    assert (facts["facts"]["requests"], facts["facts"]["cached"]) == (5, COUNT - 5)


def reply(content='"m"', logprob=None, prompt_tokens="1"):
    top = f'{{"content": [{{"token": "m", "top_logprobs": [{{"token": "m", "logprob": {logprob}}}]}}]}}'
    choices = f'[{{"message": {{"content": {content}}}, "logprobs": {top if logprob else "null"}}}]'
    return f'{{"choices": {choices}, "usage": {{"prompt_tokens": {prompt_tokens}, "completion_tokens": 1}}}}'.encode()


NONSENSE = [
    *(b'{"choices": []}', b"{}", b'"m"', b"", b"[" * 100_000, reply('["m"]'), reply("{}"), reply("3")),
    b'{"choices": [{"message": {"content": "m"}, "logprobs": {"content": [{"token": "m", "top_logprobs": 3}]}}]}',
    b'{"choices": ' + b'[{"a":' * 5_000 + b"1" + b"}]" * 5_000 + b"}",
    *(reply(prompt_tokens=tokens) for tokens in ("NaN", "1e300", "-5", '"12"', "9" * 5000)),
    *(reply(logprob=value) for value in ("NaN", "Infinity", "3.0", '"x"')),
]


def test_nonsense_costs_one_verdict_each_and_is_not_kept(in_root, tmp_path):
    with Judge() as judge:
        judge.trouble = {str(i): [nonsense] for i, nonsense in enumerate(NONSENSE)}
        artifact = judged(tmp_path, annotator(judge.url), max_unjudged=0.9)
        lost = {row["id"]: row["reason"] for row in artifact.rows() if row["preference"] is None}
        assert list(lost) == [f"{i:03d}" for i in range(len(NONSENSE))]
        assert {reason.partition(":")[0] for reason in lost.values()} == {"InvalidResponseError"}
        again = judged(tmp_path, annotator(judge.url), max_unjudged=0.01)
        assert list(preferences(again).values()) == [pytest.approx(1.9)] * COUNT
        assert len(judge.requests) == COUNT + len(NONSENSE)


def test_one_refused_request_does_not_end_log_probabilities(in_root, tmp_path):
    with Judge() as judge:
        judge.trouble = {str(COUNT - 1): [400]}
        artifact = judged(tmp_path, annotator(judge.url, engine={"concurrency": 1}))
    assert artifact.manifest["facts"]["with_logprobs"] == COUNT - 1
    assert [key for key, value in preferences(artifact).items() if value is None] == [f"{COUNT - 1:03d}"]


def test_equal_outputs_are_a_draw_without_a_question(in_root, tmp_path):
    row = {"id": "i-0", "checkpoint": "spo", "instruction": "do 0", "dataset": "d", "finished": True}
    same = row | {"output": "new", "baseline_output": "new", "baseline": "base"}
    other = row | {"id": "i-7", "output": "new", "baseline_output": "old", "baseline": "base"}
    (tmp_path / "outputs").mkdir()
    write_rows(tmp_path / "outputs" / "part-0.parquet", [same, other], schema.Output)
    with Judge() as judge:
        artifact = judged(tmp_path, annotator(judge.url))
    assert len(judge.requests) == 1
    assert preferences(artifact) == {"i-0": 1.5, "i-7": pytest.approx(1.9)}
    records = json.loads((artifact.path / "annotations.json").read_text())
    assert [record["index"] for record in records] == [0, 7]


def test_tokens_and_cost_are_counted_and_a_restart_pays_nothing(in_root, tmp_path):
    with Judge() as judge:
        artifact = judged(tmp_path, annotator(judge.url, price_per_million=[10, 30]))
        facts = artifact.manifest["facts"]
        assert (facts["prompt_tokens"], facts["answer_tokens"]) == (100 * COUNT, COUNT)
        assert facts["cost"] == pytest.approx(COUNT * (100 * 10 + 30) / 1e6)
        again = judged(tmp_path, annotator(judge.url, price_per_million=[20, 30], orders="both"))
        assert len(judge.requests) == 2 * COUNT  # the other order of each
        facts = again.manifest["facts"]
        assert (facts["requests"], facts["cached"]) == (COUNT, COUNT)
        judged(tmp_path, annotator(judge.url, model="another"))
        assert len(judge.requests) == 3 * COUNT
    assert (tmp_path / "runs" / ".judgements.sqlite").stat().st_mode & 0o777 == 0o600


def test_after_a_kill_only_what_is_missing_is_asked_for(in_root, tmp_path):
    """The process that asks is killed with SIGKILL when half of the answers are there."""
    code = "import sys, json, pathlib; from tests.evaluate.test_judge import judged; "
    code += "judged(pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]))"
    with Judge() as judge:
        settings = annotator(judge.url, engine={"concurrency": 2}, requests_per_minute=240.0)
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), json.dumps(settings)], cwd=in_root)
        end = time.monotonic() + 300
        while len(judge.requests) < COUNT // 2 and time.monotonic() < end:
            time.sleep(0.05)
        process.kill()
        process.wait()
        before = len(judge.requests)
        assert COUNT // 2 <= before < COUNT
        facts = judged(tmp_path, settings).manifest["facts"]
        assert len(judge.requests) - before == facts["requests"] == COUNT - facts["cached"]
    assert before - 2 <= facts["cached"] <= before  # two at most were under way


def test_a_locked_door_is_an_error_at_once(in_root, tmp_path):
    with Judge() as judge:
        judge.trouble = {str(i): [401] * 9 for i in range(COUNT)}
        with pytest.raises(UserError, match=r"j: http://127.* answers 401.*the key in OPENAI_API_KEY"):
            judged(tmp_path, annotator(judge.url))


def reasoning_model(body):
    """Refuses what the newer models at api.openai.com refuse."""
    wrong = body.keys() & {"max_tokens", "temperature", "logprobs"}
    return 400 if wrong or body["max_completion_tokens"] != 50 else [choice("So, I'm sure:\nM")]


def test_settings_that_a_server_refuses_are_one_error_and_can_be_replaced(in_root, tmp_path):
    request = {"max_completion_tokens": 50, "temperature": None, "reasoning_effort": "low", "some_server": {"own": 1}}
    options = {"verdict": "discrete", "max_tokens": 50}
    with ChatServer(reasoning_model) as server:
        with pytest.raises(
            UserError, match=r"refuses every request \(400: .*\): change the requests by engine\.request"
        ):
            judged(tmp_path, annotator(server.url, **options, engine={"concurrency": 1}))
        assert len(server.requests) == 2  # an output, and a short prompt that is refused too
        judged(tmp_path, annotator(server.url, **options, engine={"request": request}))
        assert len(server.requests) == 2 + COUNT
        sent = server.requests[-1][2]
    assert "max_tokens" not in sent and "temperature" not in sent
    assert (sent["reasoning_effort"], sent["some_server"]) == ("low", {"own": 1})


def test_requests_flow_at_the_given_rate(in_root, tmp_path):
    with Judge() as judge:
        start = time.monotonic()
        judged(tmp_path, annotator(judge.url, requests_per_minute=600))
    assert time.monotonic() - start >= (COUNT - 1) * 0.1


def test_repetitions_flow_at_the_given_rate_too(in_root, tmp_path):
    with Judge() as judge:
        judge.trouble = {str(i): [500] for i in range(COUNT)}
        start = time.monotonic()
        judged(tmp_path, annotator(judge.url, requests_per_minute=600))
    assert len(judge.requests) == 2 * COUNT
    assert time.monotonic() - start >= (2 * COUNT - 1) * 0.1


def config(**options):
    return AnnotatorConfig(**annotator("http://x/v1", **options))


def test_verdicts_are_read_strictly():
    ask = config()
    assert read_verdict(Reply("m", (-0.1, -2.4)), ask) == pytest.approx(1 / (1 + math.exp(2.3)))
    assert read_verdict(Reply("x", (-math.inf, -5.0)), ask) == 1.0
    assert read_verdict(Reply("x", (-math.inf, -math.inf)), ask) is None
    assert read_verdict(Reply("M", (-math.inf, -math.inf)), ask) == 1.0
    for text, second in VERDICTS:
        assert read_verdict(Reply(text, None), ask) == second
    assert read_verdict(Reply("M", (-0.1, -9.0)), config(verdict="discrete")) == 1.0
    assert read_verdict(Reply("M", None), config(verdict="weighted")) is None
    named = config(identifiers=("A", "B"), max_tokens=64)
    assert read_verdict(Reply("A is short.\nB is right.\n\nBest: [[B]]", None), named) == 1.0


def test_the_default_prompt_is_alpaca_evals_own():
    import alpaca_eval
    from alpaca_eval.utils import prompt_to_chatml

    folder = Path(alpaca_eval.__file__).parent / "evaluators_configs" / "alpaca_eval_clf_gpt4_turbo"
    text = (folder / "alpaca_eval_clf.txt").read_text().strip()
    fields = {"instruction": "say {output_1}", "output_1": "one {output_2}", "output_2": "two"}
    filled = fill(read_template(config()), **fields)
    expected = prompt_to_chatml(re.sub(r"\{(instruction|output_1|output_2)\}", lambda m: fields[m.group(1)], text))
    assert filled == expected


def test_a_prompt_of_ones_own(tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("Which? {instruction} A: {output_1} B: {output_2}")
    (turn,) = fill(read_template(config(template=file)), instruction="i", output_1="x", output_2="y")
    assert turn == {"role": "user", "content": "Which? i A: x B: y"}
    file.write_text("Which? {instruction} {output_1}")
    with pytest.raises(UserError, match=r"has no \{output_2\}"):
        read_template(config(template=file))
    with pytest.raises(UserError, match="can't be read"):
        read_template(config(template=tmp_path / "absent"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"identifiers": ("m", "m")}, "must differ"),
        ({"verdict": "weighted", "max_tokens": 9}, "max_tokens=1"),
        ({"engine": {"type": "vllm"}, "requests_per_minute": 3}, "for endpoints"),
        ({"engine": {"type": "vllm", "replicas": 2}}, "one engine"),
        ({"engine": {"type": "endpoint", "url": "http://x/v1?key=secret"}}, "use api_key_env"),
    ],
)
def test_settings_that_contradict_each_other(options, message):
    settings = {"name": "j", "model": "judge", "engine": {"type": "endpoint", "url": "http://x/v1"}}
    with pytest.raises(ValueError, match=message):
        AnnotatorConfig(**settings | options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "list of instructions"),
        ('[{"instruction": "i", "output": "o"}]', "row 0 has no text 'gen"),
    ],
)
def test_bad_instruction_files(content, message, tmp_path):
    file = tmp_path / "instructions.json"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        alpaca.read_instructions(AlpacaConfig(instructions=file, annotators=[annotator("http://x/v1")]))


def test_instructions_may_have_any_separator_within_and_a_byte_order_mark(tmp_path):
    table = [
        {"instruction": f"i {mark} j", "output": "o", "generator": "g"} for mark in ("\u2028", "\x85", "\x1c", "x")
    ]
    file = tmp_path / "instructions.jsonl"
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in table)
    file.write_text(text, encoding="utf-8-sig", newline="")
    found = alpaca.read_instructions(AlpacaConfig(instructions=file, annotators=[annotator("http://x/v1")]))
    assert [row["instruction"] for row in found] == [row["instruction"] for row in table]


def test_instructions_with_their_baseline(shared_data):
    file = shared_data / "alpaca_eval" / "eval_set_with_baseline.json"
    table = alpaca.read_instructions(AlpacaConfig(instructions=file, annotators=[annotator("http://x/v1")]))
    raw = json.loads(file.read_text())
    assert [row["instruction"] for row in table] == [row["instruction"] for row in raw]
    assert (len({row["id"] for row in table}), {row["baseline"] for row in table}) == (805, {"gpt4_1106_preview"})
    first = AlpacaConfig(instructions=file, limit=3, annotators=[annotator("http://x/v1")])
    assert alpaca.read_instructions(first) == table[:3]


def test_a_local_judges_preferences_are_its_probabilities(toy_base, chat):
    import torch

    from spo_ray.config.data import EngineConfig
    from spo_ray.evaluate.judge import local_replies
    from spo_ray.model.engines import LocalAnswers
    from spo_ray.model.load import load_model

    engine = EngineConfig(type="transformers", max_model_len=128)
    local = LocalAnswers("transformers", str(toy_base), engine, OWN_TEMPLATE)
    settings = AnnotatorConfig(name="j", model="toy", engine=engine, identifiers=("First", "2"))
    asked = [[{"role": "user", "content": text}] for text in ("How many?", "Ada owns 2 pens.", "pens " * 200)]
    unknown = [{"role": "system", "content": "Be brief."}, *asked[0]]
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    local.chat.tokenizer.chat_template = refuse + local.chat.tokenizer.chat_template
    first, second, third, fourth = local_replies(local, [*asked, unknown], settings)
    assert third.reason == "prompt longer than engine.max_model_len"
    assert fourth.reason == "the chat template refuses the messages: System role not supported"
    model, words = load_model(toy_base).eval(), [chat.tokenizer.convert_tokens_to_ids(i) for i in ("First", "2")]
    for reply, turns in zip((first, second), asked, strict=False):
        ids = torch.tensor([chat.prompt_ids(turns)])
        with torch.inference_mode():
            logps = model(input_ids=ids).logits[0, -1].log_softmax(-1)
        assert reply.logps == pytest.approx([logps[word].item() for word in words], abs=1e-4)
        assert reply.tokens == (ids.shape[1], 0)
        assert reply.text == ("2" if reply.logps[1] > reply.logps[0] else "First")
    spoken = settings.model_copy(update={"verdict": "discrete", "max_tokens": 5})
    reply, refused = local_replies(local, [asked[0], unknown], spoken)
    assert refused == fourth
    assert reply.logps is None
    assert reply.tokens[1] <= 5
