"""Lets the faults of :mod:`tests.soak.faults` happen, each followed by the same command, against an undisturbed run.

    python -m tests.soak.run FOLDER [NAME ...]

Runs every (fault, moment) without a row in ``cells.jsonl``, or those whose "fault, moment" begins with a NAME. Then
writes docs/reliability.md from the rows.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import psutil
import pyarrow.parquet as pq

from spo_ray.runtime.status import read_status

from ..chat_server import ChatServer, choice
from ..conftest import ROOT
from ..helpers import SMALL
from .faults import FAULTS, PARTS, Cell, Fault

ROWS, TEMPLATE = (Path(__file__).with_name(name) for name in ("cells.jsonl", "reliability.md"))
PORT = 4317
"""Of the judge: its address is a part of the stages' identity."""
LIMIT_S = 1200.0
"""Seconds until a command counts as hanging."""
MARK = "SPO_SOAK_CELL"
"""Environment variable by which a cell's processes are found again."""
ENDED_LATE = ("sampler SIGSTOP", "training worker SIGSTOP", "evaluator SIGSTOP")
"""Faults after which a process is ended when it has given no sign of life for two minutes."""
MADE_LAST = ("scores", "comparisons", "report")
OPTIONS = [
    *(
        *SMALL,
        "name=run",
        "preference.probe_pairs=8",
        "sampling.batch_size=8",
        "train.checkpoint.every=3",
        "train.timeout_s=60",
    ),
    *("methods={dpo: {type: dpo}, spo: {type: spo, gamma: 0.01}}", "eval.suites=[accuracy, health, alpaca_eval]"),
]


def start(cell: Cell, engine: str, before: Any = ()) -> float:
    """Start the command of a cell; return the time."""
    judge = {"name": "j", "model": "m", "engine": {"type": "endpoint", "url": cell.server.url}}
    alpaca = {"instructions": str(cell.folder.parent / "instructions.json"), "annotators": [judge], "max_tokens": 8}
    options = [f"output={cell.output}", f"engine.type={engine}", f"eval.alpaca={json.dumps(alpaca)}"]
    command = [sys.executable, "pipelines/full.py", "--config", "configs/quickstart.yaml", *OPTIONS, *options]
    cell.found["command"] = command
    with (cell.folder / "log.txt").open("a") as log:
        cell.process = subprocess.Popen([*before, *command], cwd=ROOT, env=cell.found["env"], stdout=log, stderr=log)
    return time.time()


def ended(cell: Cell) -> int | None:
    """Exit code of the command; None: it hangs, or ``status.json`` says something else."""
    try:
        code = cell.process.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        return None
    psutil.wait_procs(mine(cell), timeout=60)
    return code if code == 2 or read_status(cell.run / "status.json").get("exit_code") == code else None


def mine(cell: Cell) -> list[psutil.Process]:
    """Processes that a cell's commands have started."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            found += [process] if process.environ().get(MARK) == str(cell.folder) else []
    return found


def recovery(cell: Cell, since: float) -> float:
    """Seconds until a data file of the run is younger than a time, or the command has ended."""

    def wrote() -> bool:
        with suppress(OSError):  # files and folders come and go
            files = (file for file in cell.run.rglob("*") if file.suffix in (".parquet", ".jsonl", ".safetensors"))
            return any(file.stat().st_mtime > since for file in files)
        return False

    while cell.process.poll() is None and time.time() - since < LIMIT_S and not wrote():
        time.sleep(0.2)
    return round(time.time() - since, 1)


def facts(run: Path) -> dict[str, Any]:
    """What must be the same: rows of every table, logs, weights, the stages' digests and the summary."""
    found: dict[str, Any] = {"summary.json": json.loads((run / "summary.json").read_text())}
    for file in sorted(run.glob("*/*")):
        if file.suffix == ".parquet":
            table = f"{file.parent.name}/{file.name.partition('-')[0]}"
            rows = Counter(json.dumps(row, sort_keys=True, default=str) for row in pq.read_table(file).to_pylist())
            found[table] = found.get(table, Counter()) + rows
        elif file.name == "manifest.json":
            found[str(file.relative_to(run))] = json.loads(file.read_text())["digest"]
        elif file.name == "log.jsonl" or file.suffix == ".safetensors":
            found[str(file.relative_to(run))] = file.read_bytes()
    return found


def environment(cell: Cell, temporary: str) -> dict[str, str]:
    own = {MARK: str(cell.folder), "RAY_TMPDIR": temporary, "TMPDIR": temporary, "PYTHONPATH": str(ROOT)}
    return {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | own


def undisturbed(home: Path, engine: str, server: ChatServer) -> Path:
    """Folder with a finished run."""
    cell = Cell(home / f"base-{engine}", "", server)
    if not (cell.run / "summary.json").exists():
        cell.folder.mkdir(exist_ok=True)
        cell.found["env"] = environment(cell, str(home))
        start(cell, engine)
        assert cell.process.wait() == 0, (cell.folder / "log.txt").read_text()[-3000:]
    return cell.run


def run_cell(home: Path, name: str, moment: str, server: ChatServer) -> dict[str, Any]:
    """Run one cell; return its row."""
    fault = FAULTS[name]
    base, when = undisturbed(home, fault.engine, server), fault.moments[moment]
    cell = Cell(home / "cell", when.part, server)
    shutil.rmtree(cell.folder, ignore_errors=True)
    shutil.copytree(base, cell.run, ignore=shutil.ignore_patterns(".unfinished", "*.sqlite*"))
    if not fault.damages:
        judged = [path.name for path in cell.run.glob("judged_*")] if when.part == "evaluate" else []
        for stage in (*PARTS[when.part], *MADE_LAST, *judged):
            shutil.rmtree(cell.run / stage)
    server.requests.clear()
    temporary = tempfile.mkdtemp(prefix="spo")
    cell.found["env"] = environment(cell, temporary)
    try:
        return {"fault": name, "moment": moment, **disturbed(cell, fault, when.due, base)}
    finally:
        for process in mine(cell):
            with suppress(psutil.Error):
                process.kill()
        if cell.found.get("mounted"):
            subprocess.run(["umount", "-l", cell.folder / "output"], check=True)
        shutil.rmtree(temporary, ignore_errors=True)


def disturbed(cell: Cell, fault: Fault, due: Any, base: Path) -> dict[str, Any]:
    """Run the command with its fault, then again if it has ended; compare."""
    if fault.damages:
        fault.strike(cell)
    with fault.around(cell) as before:
        struck = start(cell, fault.engine, before)
        if not fault.damages:
            while cell.process.poll() is None and not due(cell):
                time.sleep(0.02)
            struck = time.time()
            fault.strike(cell)
        seconds = recovery(cell, struck)
        codes = [ended(cell)]
    fault.end(cell)
    if codes[0]:
        seconds = recovery(cell, start(cell, fault.engine))
        codes.append(ended(cell))
    left = [process.name() for process in mine(cell)]
    row = {"codes": codes, "recovery_s": seconds, "survived": False, "why": f"left: {left[:3]}" if left else ""}
    if codes[-1] != 0:
        row["why"] = "it hangs, or its status differs" if codes[-1] is None else "the same command failed"
        return row
    return row | compared(facts(base), facts(cell.run), row)


def compared(want: dict[str, Any], got: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """Return the differences between an undisturbed and a disturbed run."""
    tables, none = [name for name in want if isinstance(want[name], Counter)], Counter[str]()
    lost = sum((want[name] - got.get(name, none)).total() for name in tables)
    more = sum((got.get(name, none) - want[name]).total() for name in tables)
    differ = sorted(name for name in want.keys() | got.keys() if want.get(name) != got.get(name))
    why = row["why"] or (f"differ: {differ[:4]}" if differ else "")
    return {"survived": not why, "why": why, "lost": lost, "doubled": more}


def page(rows: list[dict[str, Any]]) -> str:
    """Return docs/reliability.md."""
    cells = [(name, moment) for name, fault in FAULTS.items() for moment in fault.moments]
    by_cell = {(row["fault"], row["moment"]): row for row in rows}
    ran = [by_cell[cell] for cell in cells if cell in by_cell]
    survivors = [row for row in ran if row["survived"]]
    seconds = [row["recovery_s"] for row in survivors]
    return TEMPLATE.read_text().format(
        survived=len(survivors),
        ran=len(ran),
        cells=len(cells),
        median=f"{median(seconds):.0f}",
        p95=_p95(seconds),
        soon=_p95([row["recovery_s"] for row in survivors if row["fault"] not in ENDED_LATE]),
        lost=sum(row.get("lost", 0) for row in ran),
        doubled=sum(row.get("doubled", 0) for row in ran),
        table="\n".join(_line(name, moment, by_cell.get((name, moment))) for name, moment in cells),
    )


def _p95(seconds: list[float]) -> str:
    return f"{quantiles(seconds, n=20, method='inclusive')[-1]:.0f}"


def _line(name: str, moment: str, row: dict[str, Any] | None) -> str:
    if row is None:
        return f"| {name} | {moment} | not run | | |"
    codes = ", ".join("none" if code is None else str(code) for code in row["codes"])
    end = "survived" if row["survived"] else f"**failed**: {row['why']}"
    return f"| {name} | {moment} | {end} | {codes} | {row['recovery_s']} |"


def main(folder: str, *names: str) -> None:
    home = Path(folder).absolute()
    home.mkdir(parents=True, exist_ok=True)
    asked = [{"instruction": f"Say {i}.", "output": f"{i}", "generator": "g"} for i in range(6)]
    (home / "instructions.json").write_text(json.dumps(asked))
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    done = {(row["fault"], row["moment"]) for row in rows}
    order = [(name, list(fault.moments)[i]) for i in range(3) for name, fault in FAULTS.items()]
    with ChatServer(lambda body: [choice("m")], PORT) as server:
        for name, moment in order:
            if (name, moment) in done or (names and not f"{name}, {moment}".startswith(names)):
                continue
            rows.append(run_cell(home, name, moment, server))
            print(json.dumps(rows[-1]), flush=True)
            with ROWS.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    (ROOT / "docs" / "reliability.md").write_text(page(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
