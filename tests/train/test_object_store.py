"""Checkpoints on a real S3-compatible server (moto's), written and read by Ray Train's workers."""

import json
import os
import subprocess
import sys
import time

import pytest

from ..cluster import free_port, reachable
from ..conftest import ROOT

KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing-secret", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture
def bucket():
    import boto3

    port = free_port()
    address = f"http://127.0.0.1:{port}"
    # a process of its own: its web framework must not be imported beside vLLM, which inspects all modules
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)])
    for _ in range(300):
        if reachable(port):
            break
        time.sleep(0.1)
    client = boto3.client(
        "s3",
        endpoint_url=address,
        region_name="us-east-1",
        aws_access_key_id="testing",
        aws_secret_access_key="testing-secret",
    )
    client.create_bucket(Bucket="runs")
    client.put_bucket_versioning(
        Bucket="runs", VersioningConfiguration={"Status": "Enabled"}
    )  # deleted things stay listed
    yield address, client
    server.terminate()
    server.wait()


@pytest.mark.slow
def test_checkpoints_go_to_an_object_store_and_come_back(bucket, referenced, tmp_path):
    address, client = bucket
    command = [sys.executable, "-m", "tests.train.object_store", str(referenced.path), str(tmp_path), "s3://runs/mine"]
    environment = os.environ | KEYS | {"AWS_ENDPOINT_URL": address, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    printed = dict(line.split(" ", 1) for line in done.stdout.splitlines() if line.startswith(("RESULT", "LOG")))
    result, measured = json.loads(printed["RESULT"]), json.loads(printed["LOG"])
    best = min((step for step in measured if int(step) % 2 == 0 and step != "0"), key=lambda step: measured[step])
    assert result["exported_step"] == int(best)  # read back from the store
    assert result["train"]["logps/chosen"] == pytest.approx(measured[best], abs=1e-4)
    written = {entry["Key"] for entry in client.list_object_versions(Bucket="runs")["Versions"]}
    for step in (2, 4, 6):
        assert any(f"_step_{step:08d}/" in key and key.endswith(".distcp") for key in written)
    assert "Contents" not in client.list_objects_v2(Bucket="runs", Prefix="mine/train_")  # gone with the training
    manifest = next(tmp_path.rglob("manifest.json")).read_text()
    assert "testing-secret" not in manifest + done.stdout + done.stderr
