"""Commands of ``spo-ray`` that train nothing: checks, files of rows, finished runs."""

import contextlib
import json
import sys
import webbrowser
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter
from cyclopts.validators import Number

from spo_ray.config.load import load
from spo_ray.errors import UserError
from spo_ray.pipeline.command import ConfigPath, Flag, Json, Output, Overrides, guarded
from spo_ray.runtime.console import installed, set_verbosity, show


def doctor(*overrides: Overrides, config: ConfigPath | None = None, json: Json = False) -> int:
    """Check Python, packages, GPU, vLLM, ports and authentication; with a configuration also disk, hub and cluster.

    A failed check says what to do, and makes the exit code 1.
    """
    from spo_ray.pipeline.doctor import as_json, examine, passed, table

    set_verbosity(False)
    loaded, problem = None, None
    try:
        loaded = load(config, overrides) if config else None
    except UserError as error:
        problem = str(error)
    with contextlib.redirect_stdout(sys.stderr), installed():  # stdout holds only the answer
        checks = examine(loaded, problem)
    show(as_json(checks) if json else table(checks))
    return 0 if passed(checks) else 1


def inspect(
    *overrides: Overrides,
    config: ConfigPath = Path("configs/quickstart.yaml"),
    data: Path | None = None,
    rows: int = 3,
    displacement: bool = False,
) -> int:
    """Show how training reads preference data: tokens, masks, lengths, and which rows would be dropped.

    Parameters
    ----------
    data
        A .jsonl or .parquet file, a folder with train.jsonl, or a dataset on the hub.
    rows
        Number of rows to show.
    displacement
        Load the model, and list the pairs that lower the chosen response's probability most.
    """

    def work() -> None:
        from rich.console import Console

        from spo_ray.data.inspect import inspect_data

        inspect_data(load(config, overrides), data, rows, Console(markup=False), displacement)

    return guarded(work)


def import_gguf(file: Path, folder: Path) -> int:
    """Write the model of a GGUF file as safetensors in float32, with tokenizer and chat template, to train it here.

    Parameters
    ----------
    file
        GGUF file of an architecture that transformers reads, such as llama, qwen2 or gemma2.
    folder
        Folder for the model, which must be new or empty.
    """

    def work() -> None:
        set_verbosity(False)
        from spo_ray.model.gguf import import_gguf

        import_gguf(file, folder)

    return guarded(work)


def report(
    *runs: Annotated[Path, Parameter(help="Folders of finished runs or sweeps, such as runs/quickstart.")],
    out: Path | None = None,
    samples: Annotated[int | None, Parameter(validator=Number(gt=0))] = None,
    open: Flag = False,
    markdown: Flag = False,
    csv: Flag = False,
    output: Output = Output(),
) -> int:
    """Write a finished run's page anew, or with several runs one page that compares them; no cluster is started.

    A sweep is a run too: a comparison shows its best point, and how its objective depends on its parameters.

    Parameters
    ----------
    out
        Where a comparison goes, a folder or an .html file; report-comparison beside the first run unless given.
    samples
        Number of held-out prompts whose answers a run's page shows; 50 unless given.
    open
        Open the page in the browser.
    markdown
        Print the results as Markdown, for a pull request or a model card, and write no page.
    csv
        Print every score with its interval as CSV, and write no page.
    """

    def work() -> None:
        set_verbosity(False)
        from spo_ray.pipeline.finished import read_finished
        from spo_ray.report.comparison import named, write_reports
        from spo_ray.report.texts import as_csv, as_markdown

        found = named([read_finished(folder, verify=output.verify) for folder in runs])
        if markdown or csv:
            print((as_markdown if markdown else as_csv)(found))
            return
        page = write_reports(found, out, samples)
        if open:
            webbrowser.open(page.absolute().as_uri())

    return guarded(work, output)


score = App(name="score", help="Grade responses of other programs.")


@score.command
def gsm8k(file: Path) -> int:
    """Grade a JSONL file with question, answer and response; write FILE.scored.jsonl and print the accuracy.

    Parameters
    ----------
    file
        JSONL file; answers are GSM8K solutions or numbers.
    """

    def work() -> None:
        from spo_ray.evaluate.grade_file import score_gsm8k

        result, defects = score_gsm8k(file)
        print(json.dumps(result))
        for defect in defects:
            show(f"left out, {defect}", error=True)

    return guarded(work)


@score.command(name="alpaca-eval")
def alpaca_eval(annotations: Path, *, lc: Literal["minimal", "v1"] = "v1") -> int:
    """Print the win rates of AlpacaEval's annotations.json as JSON.

    Parameters
    ----------
    annotations
        Records with instruction, output_1, output_2, generator_1, generator_2 and preference (1 to 2, or null).
    lc
        Formula of the length-controlled win rate. v1, the leaderboard's, needs a table from the hub; without it the
        minimal formula is used, and lc_method in the result says so.
    """

    def work() -> None:
        from spo_ray.evaluate.win_rates import read_annotations, win_rates

        result = win_rates(read_annotations(annotations), lc)
        unjudged = result.pop("unjudged")
        print(json.dumps(result))
        if unjudged:
            show(f"{unjudged} records without a preference are left out", error=True)
        if not result["lc_method"].endswith(lc):
            show("v1's table can't be downloaded: the length-controlled win rate uses the minimal formula", error=True)

    return guarded(work)
