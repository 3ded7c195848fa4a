"""Pages that are made from the source are current."""

import subprocess
import sys

from .conftest import ROOT

SCRIPT = ROOT / "scripts" / "configuration.py"


def test_the_page_of_the_configuration_is_current():
    done = subprocess.run([sys.executable, str(SCRIPT), "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (ROOT / "docs" / "configuration.md").read_text()
    for row in (
        "| `lambda_sft` | number, at least 0 | `1.0` |",
        "| `quantile` | number, null, at least 0, at most 1 | `null` |",
        '| `on_alarm` | `warn`, `stop` | `"warn"` |',
        "## `methods.NAME`, type `spo`",
    ):
        assert row in text


def test_a_page_that_is_not_current_is_told(tmp_path):
    code = (
        f"import importlib.util as u, pathlib, sys; s = u.spec_from_file_location('c', {str(SCRIPT)!r});"
        "m = u.module_from_spec(s); s.loader.exec_module(m); m.PAGE = pathlib.Path(sys.argv[2]); sys.exit(m.main())"
    )
    stale = tmp_path / "configuration.md"
    stale.write_text("old")
    done = subprocess.run([sys.executable, "-c", code, "--check", str(stale)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "make docs" in done.stdout
