"""Renders a chat template within limits; :func:`spo_ray.model.tokenizer.check_template` runs this file as a process.

A template is a program that comes with a model: in the process that loads the model it could loop for ever, or fill
the memory. Reads ``{"template", "special_tokens", "chats"}`` as JSON from stdin, and prints why the template can't be
used, or nothing. It imports transformers alone, so that it starts in a second.
"""

import json
import resource
import sys
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

SECONDS = 2
"""Limit of CPU time."""
MIB = 512
"""Limit of memory."""
CHARACTERS = 2**20
"""Limit of the text that the template makes of a few words."""


def set_limits() -> None:
    """Limit what this process may take from now on; a process that exceeds its CPU time is killed by the kernel."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + 1 + SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pages = Path("/proc/self/statm")
    if pages.exists():  # on Linux
        size = int(pages.read_text().split()[0]) * resource.getpagesize() + MIB * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


def problem(asked: dict[str, Any]) -> str:
    """Return why the template can't be used, or an empty text."""
    try:
        for chat, start_answer in asked["chats"]:
            settings = {"chat_template": asked["template"], "add_generation_prompt": start_answer}
            texts, _ = render_jinja_template([chat], **settings, **asked["special_tokens"])
            if len(texts[0]) > CHARACTERS:
                return f"it makes more than {CHARACTERS:,} characters of a few words"
    except MemoryError:
        return f"it takes more than {MIB} MiB of memory"
    except Exception as error:  # whatever a template raises
        return (str(error).splitlines() or [type(error).__name__])[0][:300]
    return ""


if __name__ == "__main__":
    read = json.load(sys.stdin)
    set_limits()
    print(problem(read))
