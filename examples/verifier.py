"""A task of your own: multiple-choice questions, answered with a letter.

Data: JSONL rows such as ``{"question": "Which is a prime? (A) 4 (B) 5 (C) 6", "answer": "B"}``. Configuration:

    data:
      type: questions
      path: data/choices # train.jsonl and test.jsonl
      verifier: examples.verifier:MultipleChoice
      prompt: "{question}\\nAnswer with 'Answer: ' and the letter."

The module is imported on every node: run from the repository's root, or put its folder into PYTHONPATH.
"""

import re

from spo_ray.data.verifiers import Grade

SAID = re.compile(r"answer\s*(?:is|:)\s*\(?([A-E])\b", re.IGNORECASE)
ALONE = re.compile(r"\b([A-E])\b")


class MultipleChoice:
    """The letter behind the last "answer:" or "answer is"; else the last capital letter that stands alone."""

    def accepts(self, answer: str) -> bool:
        """Whether a row's answer is a letter: rows without one are refused, or quarantined."""
        return re.fullmatch(r"\s*[A-E]\s*", answer) is not None

    def grade(self, response: str, answer: str) -> Grade:
        """``correct`` however the letter is given, ``strict`` only where it was said to be the answer."""
        said, alone = SAID.findall(response), ALONE.findall(response)
        found = (said or alone)[-1].upper() if said or alone else None
        right = found == answer.strip()
        return Grade(found, right, right and bool(said))
