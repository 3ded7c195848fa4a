"""Files for clusters against schemas: Ray's own for its launcher; for KubeRay the fields of its documented API.

KubeRay's CRD is in no package, so the fields that ``deploy/rayjob.yaml`` may use are written down here.
"""

import json
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from spo_ray.config.load import load
from spo_ray.pipeline.job import plan_job
from spo_ray.runtime.cluster import check_resources

from .conftest import ROOT

LAUNCHER = ["cluster.yaml", "deploy/aws.yaml"]
SCHEMA = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())


def fields(required=(), **properties):
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": properties}


TEXT, WHOLE, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}  # Kubernetes takes no numbers here
QUANTITIES = {"type": "object", "additionalProperties": {"type": "string", "pattern": r"^\d+(\.\d+)?(m|Ki|Mi|Gi|Ti)?$"}}
SECRET = fields(["name", "key"], name=TEXT, key=TEXT, optional=FLAG)
VARIABLE = fields(["name"], name=TEXT, value=TEXT, valueFrom=fields(["secretKeyRef"], secretKeyRef=SECRET))
CONTAINER = fields(
    ["name", "image"],
    name=TEXT,
    image=TEXT,
    env={"type": "array", "items": VARIABLE},
    ports={"type": "array", "items": fields(["containerPort"], containerPort=WHOLE, name=TEXT)},
    resources=fields(requests=QUANTITIES, limits=QUANTITIES),
    volumeMounts={"type": "array", "items": fields(["name", "mountPath"], name=TEXT, mountPath=TEXT)},
)
VOLUME = fields(
    ["name"],
    name=TEXT,
    persistentVolumeClaim=fields(["claimName"], claimName=TEXT),
    emptyDir=fields(medium=TEXT, sizeLimit=TEXT),
)
POD = fields(
    ["spec"],
    spec=fields(
        ["containers"],
        containers={"type": "array", "items": CONTAINER, "minItems": 1},
        volumes={"type": "array", "items": VOLUME},
    ),
)
CLUSTER = fields(
    ["headGroupSpec"],
    rayVersion=TEXT,
    authOptions=fields(["mode"], mode={"const": "token"}, secretName=TEXT),
    enableInTreeAutoscaling=FLAG,
    headGroupSpec=fields(["template", "rayStartParams"], rayStartParams=TEXTS, serviceType=TEXT, template=POD),
    workerGroupSpecs={
        "type": "array",
        "items": fields(
            ["groupName", "template", "rayStartParams"],
            groupName=TEXT,
            replicas=WHOLE,
            minReplicas=WHOLE,
            maxReplicas=WHOLE,
            rayStartParams=TEXTS,
            template=POD,
        ),
    },
)
JOB = fields(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=fields(["name"], name=TEXT, namespace=TEXT),
    spec=fields(
        ["entrypoint", "rayClusterSpec"],
        entrypoint=TEXT,
        shutdownAfterJobFinishes=FLAG,
        ttlSecondsAfterFinished=WHOLE,
        activeDeadlineSeconds=WHOLE,
        backoffLimit=WHOLE,
        runtimeEnvYAML=TEXT,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
        rayClusterSpec=CLUSTER,
    ),
)


def read(name):
    """The last document of a file."""
    return documents(name)[-1]


def documents(name):
    return list(yaml.safe_load_all((ROOT / name).read_text()))


@pytest.mark.parametrize("name", LAUNCHER)
def test_the_launcher_takes_the_files(name):
    whole = prepare_config(read(name))  # as `ray up` does before it starts anything
    jsonschema.validate(whole, SCHEMA)
    validate_config(whole)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(whole | {"max_wrokers": 1}, SCHEMA)


@pytest.mark.parametrize("name", LAUNCHER)
def test_the_launchers_dashboard_is_on_loopback_and_behind_a_token(name):
    tree = read(name)
    for command in (*tree["head_start_ray_commands"], *tree["worker_start_ray_commands"]):
        if " start " in command:
            assert "RAY_AUTH_MODE=token" in command
            assert "--head" not in command or "--dashboard-host=127.0.0.1" in command


def test_kuberay_takes_the_job():
    tree = read("deploy/rayjob.yaml")
    jsonschema.validate(tree, JOB)
    spec = tree["spec"]["rayClusterSpec"]
    assert spec["rayVersion"] == metadata.version("ray")
    containers = [
        group["template"]["spec"]["containers"][0] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])
    ]
    for container in containers:
        secrets = {v["name"]: v for v in container["env"] if re.search("TOKEN|KEY", v["name"])}
        assert secrets.keys() == {"HF_TOKEN"}  # the operator sets Ray's own, in the submitter too
        assert all("value" not in variable for variable in secrets.values())  # from secrets alone
        assert {m["name"] for m in container["volumeMounts"]} == {
            v["name"] for v in spec["headGroupSpec"]["template"]["spec"]["volumes"]
        }
    assert spec["authOptions"] == {"mode": "token"}
    workers = spec["workerGroupSpecs"][0]
    assert int(containers[1]["resources"]["limits"]["nvidia.com/gpu"]) * workers["replicas"] == 2


def test_the_claim_of_the_job_is_made_with_it_and_can_be_mounted_by_all_nodes():
    claim, job = documents("deploy/rayjob.yaml")
    groups = job["spec"]["rayClusterSpec"]
    for group in (groups["headGroupSpec"], *groups["workerGroupSpecs"]):
        (used,) = [v for v in group["template"]["spec"]["volumes"] if "persistentVolumeClaim" in v]
        assert used["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert (claim["kind"], claim["spec"]["accessModes"]) == ("PersistentVolumeClaim", ["ReadWriteMany"])


@pytest.mark.parametrize("name", LAUNCHER)
def test_every_node_mounts_the_shared_folder_before_setup(name):
    _, mount, setup = read(name)["setup_commands"]
    assert "mount -t nfs" in mount
    assert "make setup" in setup


def test_the_jobs_command_is_one_that_runs_and_fits_its_cluster(in_root):
    program, command, option, path, *overrides = read("deploy/rayjob.yaml")["spec"]["entrypoint"].split()
    assert (program, command, option) == ("spo-ray", "run", "--config")
    nodes = [{"CPU": 0.0}, {"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 1.0}]
    check_resources(plan_job(load(path, overrides)).planned, nodes)


def test_the_dockerfile():
    """The same linter as a container registry's; the daemon that could build it is not everywhere."""
    text = (ROOT / "Dockerfile").read_text()
    assert "USER 1000" in text
    command = json.loads(text.rpartition("CMD ")[2])
    assert (ROOT / command[-1]).exists()
    linter = shutil.which("hadolint")
    if linter is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([linter, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("config", ["gsm8k/llama-3.2-1b", "ultrafeedback/llama-3.2-3b"])
def test_the_nodes_that_are_always_there_can_hold_the_papers_runs(in_root, config):
    types = yaml.safe_load((ROOT / "deploy" / "aws.yaml").read_text())["available_node_types"]
    nodes = [kind["resources"] for kind in types.values() for _ in range(kind.get("min_workers", 0))]
    check_resources(plan_job(load(ROOT / "configs" / f"{config}.yaml", [])).planned, nodes)
