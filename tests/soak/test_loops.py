"""What goes wrong only after many repetitions, at a tenth of the size or less unless ``make soak`` runs them.

SPO_SOAK_CALLS, SPO_SOAK_ROWS, SPO_SOAK_STEPS and SPO_SOAK_CYCLES are the sizes.
"""

import json
import os
import random
import threading
import time
from collections import Counter
from contextlib import suppress

import psutil
import pytest

from spo_ray.config.evaluate import AnnotatorConfig
from spo_ray.data.grade import grade_samples
from spo_ray.data.pairs import pair_samples
from spo_ray.evaluate.judge import ask_endpoint
from spo_ray.runtime import schema
from spo_ray.runtime.artifact import Artifact, write_rows
from spo_ray.runtime.run import Run
from spo_ray.train.entry import CHECKPOINTS

from ..chat_server import ChatServer, choice
from ..helpers import small_config
from ..train.processes import train
from ..train.test_resume import finish, same, start, wait_for_step, workers


def size(name, default):
    return int(os.environ.get(f"SPO_SOAK_{name}", default))


def test_no_judgement_is_lost_or_doubled_with_a_third_of_the_requests_failing():
    """The server refuses a request up to four times."""
    count, rng, kept = size("CALLS", 2000), random.Random(3), []
    trouble = {i: [rng.choice([500, 429, 503]) for _ in range(4) if rng.random() < 0.35] for i in range(count)}
    failures = sum(map(len, trouble.values()))

    def answer(body):
        number = int(body["messages"][0]["content"])
        return trouble[number].pop() if trouble[number] else [choice(f"m{number}")]

    with ChatServer(answer) as server:
        server.retry_after = "0.01"
        engine = {"type": "endpoint", "url": server.url, "concurrency": 32}
        judge = AnnotatorConfig.model_validate({"name": "j", "model": "j", "engine": engine, "verdict": "discrete"})
        asked = [[{"role": "user", "content": str(i)}] for i in range(count)]
        assert ask_endpoint(judge, asked, lambda i, reply: kept.append((i, reply.text))) == {}
        assert len(server.requests) == count + failures
    assert sorted(kept) == [(i, f"m{i}") for i in range(count)]


def test_every_row_comes_out_of_grading_and_pairing_once(local_ray, in_root, tmp_path):
    """Every tenth question has right samples only, every seventh a sample that is cut."""
    count, folder = size("ROWS", 100_000), tmp_path / "made"
    folder.mkdir()
    table = [
        {
            **{
                "id": f"{i:07d}",
                "prompt": "p",
                "gold": f"{i}",
                "responses": [f"#### {i}"],
                "response_sources": ["gold"],
            },
            **{"prompt_ids": [1], "refused": None, "seed": 0, "sample_logps": [-1.0, -1.0], "sample_tokens": [3, 3]},
            "samples": [f"#### {i}", f"#### {i + (i % 10 > 0)}"],
            "finished": [True, i % 7 > 0],
        }
        for i in range(count)
    ]
    for part in range(0, count, 50_000):
        write_rows(folder / f"part-{part:07d}.parquet", table[part : part + 50_000], schema.Samples)
    run = Run(small_config(tmp_path, "data.type=gsm8k", "data.path=."))
    scored = grade_samples(run, "sft_scores", Artifact(folder, "made"))
    pairs = pair_samples(run, "pair_candidates", scored)
    assert Counter(scored.column("id")) == Counter(row["id"] for row in table)
    assert scored.column("correct") == [[True, i % 10 == 0] for i in range(count)]
    paired = [i for i in range(count) if i % 10 and i % 7]
    assert Counter(pairs.column("source_id")) == Counter(f"{i:07d}" for i in paired)
    assert Counter(pairs.column("rejected")) == Counter(f"#### {i + 1}" for i in paired)
    manifest = json.loads((pairs.path / "manifest.json").read_text())
    assert manifest["rows"] == {
        "read": count, "kept": len(paired), "dropped": {"no wrong sample with an end token": count - len(paired)}
    }  # fmt: skip


def test_memory_and_descriptors_stay_the_same_over_many_steps(referenced, tmp_path):
    """The slope of a line through the second half: at most 1 MiB per 1,000 steps, and 4 descriptors more in all.

    A few steps may need up to 4 MiB more: memory is taken from the system in blocks.
    """
    steps = size("STEPS", 500)
    options = ["train.max_length=64", f"preference.epochs={steps // 6}", f"preference.probe_every={steps}"]
    arguments = (1, referenced.path, tmp_path / "out", [*options, f"preference.health_every={steps}"], "spo")
    thread = threading.Thread(target=train, args=arguments)
    thread.start()
    log, seen = tmp_path / "out" / "log.jsonl", []
    while thread.is_alive():
        time.sleep(0.5)
        with suppress(psutil.Error):  # it is about to end
            children = psutil.Process().children()
            servers = [child for child in children if "multiprocessing.forkserver" in " ".join(child.cmdline())]
            for worker in servers[0].children() if servers and log.exists() else ():
                seen.append((log.read_bytes().count(b"\n"), worker.memory_info().rss / 2**20, worker.num_fds()))
    assert seen and seen[-1][0] > 0.9 * steps
    half = [point for point in seen if steps / 2 < point[0] < 0.95 * steps]
    middle, mean = (sum(point[i] for point in half) / len(half) for i in (0, 1))
    slope = sum((x - middle) * (y - mean) for x, y, _ in half) / sum((x - middle) ** 2 for x, _, _ in half)
    print(
        f"{steps} steps, {mean:.0f} MiB, {1000 * slope:+.2f} MiB per 1,000, descriptors {half[0][2]} to {half[-1][2]}"
    )
    assert half[-1][2] - half[0][2] <= 4
    assert 1000 * slope <= max(1.0, 4.0 / (steps / 2000))


@pytest.mark.slow
def test_many_kills_and_resumptions_end_bit_for_bit(referenced, tmp_path):
    """At random steps a training worker is killed, and every tenth time the driver, and its list of checkpoints cut."""
    cycles, rng = size("CYCLES", 6), random.Random(11)
    options = ["methods={spo: {type: spo}}", f"train.max_failures={cycles + 9}", f"preference.epochs={cycles + 2}"]
    (whole, broken) = (tmp_path / name for name in ("whole", "broken"))
    for folder in (whole, broken):
        folder.mkdir()
    expected = finish(start(whole, referenced, "methods", *options), whole)
    process = start(broken, referenced, "methods", *options)
    for cycle in range(cycles):
        wait_for_step(broken, "spo", 6 * cycle + rng.randint(1, 5))
        if cycle % 10 < 9:
            while not (found := workers(process)):  # the killed driver's log may be that far already
                assert process.poll() is None, (broken / "output.txt").read_text()[-5000:]
                time.sleep(0.02)
            found[0].kill()
            continue
        family = [*workers(process), *workers(process, "TrainController")]
        process.kill()
        process.wait()
        assert not psutil.wait_procs(family, timeout=120)[1]  # until then its controller may write the list
        for listed in (broken / "quickstart" / ".unfinished").glob(f"train_*/{CHECKPOINTS}"):
            os.truncate(listed, 0)  # Ray Train writes it in place
        process = start(broken, referenced, "methods", *options)
    same(finish(process, broken), expected, "spo")
    said = (broken / "output.txt").read_text().count("can't be read: its copy is used")
    assert said == cycles // 10
