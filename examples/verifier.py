"""Example of your own verifier, for multiple-choice questions that are answered with a letter.

The data is JSONL, with rows such as ``{"question": "Which is a prime? (A) 4 (B) 5 (C) 6", "answer": "B"}``.
The configuration is:

    data:
      type: questions
      path: data/choices # train.jsonl and test.jsonl
      verifier: examples.verifier:MultipleChoice
      prompt: "{question}\\nAnswer with 'Answer: ' and the letter."

All nodes import this module: start the run in the repository's root, or add that folder to PYTHONPATH.
"""

import re

from spo_ray.data.verifiers import Grade

SAID = re.compile(r"answer\s*(?:is|:)\s*\(?([A-E])\b", re.IGNORECASE)
ALONE = re.compile(r"\b([A-E])\b")


class MultipleChoice:
    """Reads the letter after the last "answer:" or "answer is", or else the last capital letter that stands alone."""

    def accepts(self, answer: str) -> bool:
        """Return True if a row's answer is a letter; rows without one are refused or quarantined."""
        return re.fullmatch(r"\s*[A-E]\s*", answer) is not None

    def grade(self, response: str, answer: str) -> Grade:
        """``correct`` accepts both forms, ``strict`` only a letter behind "answer:" or "answer is"."""
        said, alone = SAID.findall(response), ALONE.findall(response)
        found = (said or alone)[-1].upper() if said or alone else None
        right = found == answer.strip()
        return Grade(found, right, right and bool(said))
