"""A real OpenAI-compatible server, vLLM's own with the toy model, as a teacher and as a judge."""

import importlib.util
import math
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from spo_ray.config.data import EndpointConfig, SamplingConfig
from spo_ray.data.sample import SamplingJob
from spo_ray.model.load import load_model
from spo_ray.runtime.artifact import Artifact

from .chat_server import answers_of
from .evaluate.test_judge import annotator, judged
from .model.test_engines import trainer_logps

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
QUESTION = "Each of 5 boxes holds 7 pens. How many pens do the boxes hold?"
START_S = 300


@pytest.fixture(scope="module")
def server(toy_base, tmp_path_factory):
    """The server's address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--host=127.0.0.1", f"--port={port}", "--served-model-name=toy", "--dtype=float32", "--enforce-eager"]
    options += ["--max-model-len=256", "--no-enable-chunked-prefill"]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(toy_base), *options]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        end = time.time() + START_S
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=2).close()
                break
            except OSError:
                assert process.poll() is None and time.time() < end, log.read_text()[-2000:]
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(30)


def test_a_served_teachers_samples_have_the_models_log_probabilities(server, chat, toy_base):
    source = SamplingJob(
        Artifact(Path("toy"), "toy"),
        EndpointConfig(type="endpoint", url=server),
        SamplingConfig(samples=4, temperature=0.7, max_tokens=64),
    )
    (found,), (again,) = (answers_of(source)([(QUESTION, 7)]) for _ in range(2))
    assert [c.text for c in found.completions] == [c.text for c in again.completions]
    done = [c for c in found.completions if c.finished]
    assert done
    prompts = [chat.prompt_ids(QUESTION)] * len(done)
    expected, counts = trainer_logps(toy_base, chat, prompts, [c.text for c in done])
    for completion, logp, count in zip(done, expected.tolist(), counts.tolist(), strict=True):
        assert completion.tokens == count
        assert completion.logp == pytest.approx(logp, abs=1e-3 * count)


def test_a_served_judges_preferences_are_the_models_probabilities(server, chat, toy_base, in_root, tmp_path):
    """The toy model can't judge: it is asked how likely its answer begins with one word or another."""
    template = tmp_path / "prompt.txt"
    template.write_text("{instruction} boxes of {output_1} pens or {output_2} pens. How many pens?")
    identifiers = ("First", "2")
    settings = annotator(server, model="toy", template=template, identifiers=identifiers, engine={"timeout_s": 60.0})
    artifact = judged(tmp_path, settings, max_unjudged=1.0)
    model, words = load_model(toy_base).eval(), [chat.tokenizer.convert_tokens_to_ids(i) for i in identifiers]
    seen = 0
    for row in artifact.rows():
        i, first = int(row["id"]), row["checkpoint_first"][0]
        outputs = (f"new {i}" + "!" * i, f"old {i}")
        one, two = outputs if first else outputs[::-1]
        ids = torch.tensor([chat.prompt_ids(f"do {i} boxes of {one} pens or {two} pens. How many pens?")])
        with torch.inference_mode():
            logps = model(input_ids=ids).logits[0, -1].log_softmax(-1)
        top = set(logps.topk(5).indices.tolist())
        known = [logps[w].item() if w in top else -math.inf for w in words]
        if max(known) == -math.inf:
            assert row["preference"] is None or row["verdicts"][0] in identifiers
            continue
        second = 1 / (1 + math.exp(min(700, known[0] - known[1])))
        assert row["preference"] == pytest.approx(1 + (1 - second if first else second), abs=1e-3)
        seen += 1
    assert seen > 4
