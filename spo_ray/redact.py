"""Secrets stay out of what is printed and written."""

import os
import re

SECRET = re.compile(
    r"(token|key|secret|password|passwd|credential)s?$"
    r"|(^|_)(token|key|secret|pass|password|passwd|credential)s?(_(?!file$|path$|dir$)|$)",
    re.IGNORECASE,
)
"""Names of environment variables whose value is a secret."""
SHORTEST = 6
"""A shorter value is no secret, and would be struck out of innocent words."""
IN_ADDRESS = re.compile(r"(?<=://)[^/\s:@]*:(?!\d+/)[^\s@]+(?=@)")
"""User and password; a port ends at a slash."""
KNOWN = re.compile(r"\b(hf_|sk-|ghp_|AKIA)[A-Za-z0-9_-]{12,}")
"""Hugging Face, OpenAI, GitHub, AWS."""


def is_secret(name: str) -> bool:
    """Whether an environment variable of that name holds a secret."""
    return SECRET.search(name) is not None


def redact(text: str) -> str:
    """The text without the secrets of this process's environment, and without what looks like one."""
    secrets = {value: name for name, value in os.environ.items() if is_secret(name) and len(value) >= SHORTEST}
    for value in sorted(secrets, key=len, reverse=True):
        text = text.replace(value, f"[{secrets[value]}]")
    return KNOWN.sub("[secret]", IN_ADDRESS.sub("[secret]", text))
