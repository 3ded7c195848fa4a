r"""GSM8K: extracts the answers of responses, compares them, and grades.

There are two ways to read a response. Strict: only the last ``#### N``, the form in which GSM8K's solutions end.
Flexible: also what models write that were not trained on GSM8K, which is ``\boxed{N}``, "the answer is N", "A: N", or
else the last number. :mod:`spo_ray.data.numerals` reads the numbers.
"""

import re
from bisect import bisect_left
from fractions import Fraction

from spo_ray.data.numerals import NUMBER, Result, plain, read, result, tokens
from spo_ray.data.verifiers import Grade

GAP = 40
"""Most characters between "the answer is" and its number."""
_THOUGHTS = re.compile(
    r"(?is)^.*(?:</(?:think|thinking|thought|reasoning)>|\[/THINK\])|(?:<(?:think|thinking|thought|reasoning)>|\[THINK\]).*"
)
_MARK = re.compile(r"####[ \t*]*")
_RUN_ON = re.compile(r"(####[ \t*]*[^\s\d]{0,3}\d[^\n]*)\n[ \t\n]{0,9}(?:Question|Problem|Q|User|Human) ?:")
"""An answer behind which a model goes on with a question of its own."""
_HEADING = re.compile(r"[.)][ \t]+\S")  # "#### 1. Cost" may be a heading
_LETTERED = r"^[^\S\n]*{}:"  # "A:" marks an answer, unless there is also "B:"
_SAID = re.compile(rf"(?i:\banswer\b)\s*(?:(?i:is|are|=)(?!\s+not\b)|(:))|({_LETTERED.format('A')})", re.MULTILINE)
_OTHER_LETTER = re.compile(_LETTERED.format("B"), re.MULTILINE)
_SENTENCE = re.compile(r"[^\n]*?(?:[.!?](?=\s|$)|(?=\n)|$)")
_BRACE = re.compile(r"(\\boxed\s*)?\{|\}")


class Gsm8k:
    """Verifier for GSM8K: ``correct`` reads the response flexibly, ``strict`` takes only the number behind ``####``."""

    def accepts(self, answer: str) -> bool:
        """Return True if the answer is a GSM8K solution or a number."""
        return gold_answer(answer) is not None

    def grade(self, response: str, answer: str) -> Grade:
        """Compare the response's answer with the gold answer as numbers."""
        found = extract_flexible(response)
        return Grade(found, is_correct(found, answer), is_correct(extract(response), answer))


def extract(text: str) -> str | None:
    """Return the number behind the last ``####`` of a response, without separators, currency, percent sign or zeros.

    None if there is none. Fractions stay fractions, in lowest terms.
    """
    found = _marked(_written(text))
    return found.value if found else None


def extract_flexible(text: str) -> str | None:
    """Return the answer by the first of these that occurs: ``####``, ``\\boxed``, "the answer is", the last number.

    The answer to a calculation is its result: 14 in "the answer is (3+4)*2 = 14". A calculation without a result is no
    answer, but a number that follows it may be one.
    """
    text = _written(text)
    marked = _marked(text)
    if marked is not None:
        return marked.value
    response = _Response(text)
    found = response.boxed() or response.said() or response.last()
    return found.value if found else None


def gold_answer(text: str) -> str | None:
    """Return the gold answer of a GSM8K solution (``... #### N``) or of a bare number; None if it is neither."""
    marked = extract(text)
    return marked if marked is not None else read(plain(text).strip())


def is_correct(extracted: str | None, gold: str) -> bool:
    """Return True if an extracted answer equals the gold answer as a number."""
    answer = gold_answer(gold)
    return extracted is not None and answer is not None and Fraction(extracted) == Fraction(answer)


def _written(text: str) -> str:
    """Return the plain text of a response behind its thoughts and before a further question."""
    text = plain(_THOUGHTS.sub("", text))
    further = _RUN_ON.search(text)
    return text[: further.end(1)] if further else text


def _marked(text: str) -> Result | None:
    """Return the number that stands directly behind the last ``####``, or the result of a calculation there.

    None where no number stands there.
    """
    found = [number for mark in _MARK.finditer(text) if (number := NUMBER.match(text, mark.end()))]
    if len(found) > 1:
        found = [number for number in found if not _HEADING.match(text, number.end())]
    if not found:
        return None
    end = text.find("\n", found[-1].end())
    return result(tokens(text, found[-1].start(), end if end > 0 else len(text)), 0, len(text))


class _Response:
    """A plain text and its tokens."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = tokens(self.text)
        self.starts = [token.start for token in self.tokens]
        self.numbers = [token.start for token in self.tokens if token.kind == "number"]

    def boxed(self) -> Result | None:
        """Return what the last ``\\boxed{...}`` with a number holds; the box may lack its end."""
        boxes: list[tuple[int, int]] = []
        opened: list[tuple[int, bool]] = []
        for brace in _BRACE.finditer(self.text):
            if brace.group() != "}":
                opened.append((brace.end(), brace.group(1) is not None))
            elif opened:
                start, is_box = opened.pop()
                boxes += [(start, brace.start())] if is_box else []
        boxes += [(start, len(self.text)) for start, is_box in opened if is_box]
        last = next((box for box in sorted(boxes, reverse=True) if self.has_number(*box)), None)
        return result(self.tokens, bisect_left(self.starts, last[0]), last[1]) if last else None

    def said(self) -> Result | None:
        """Return what the last "the answer is" or "A:" says.

        A colon may also begin a whole solution, or be in "to get the answer: add 3 and 4". Therefore words between it
        and its number are allowed in the last sentence with numbers only.
        """
        lettered, found = _OTHER_LETTER.search(self.text) is None, None
        for said in reversed(list(_SAID.finditer(self.text))):
            sentence = _SENTENCE.match(self.text, said.end())
            end = sentence.end() if sentence else said.end()
            if (said.group(2) and not lettered) or not self.has_number(said.end(), min(said.end() + GAP, end)):
                continue
            number = self.numbers[bisect_left(self.numbers, said.end())]
            between = any(c.isalpha() for c in self.text[said.end() : number])
            if between and (said.group(1) or said.group(2)) and self.has_number(end, len(self.text)):
                continue
            found = result(self.tokens, bisect_left(self.starts, said.end()), len(self.text))
            if not found.unfinished:
                return found
            if self.has_number(found.end, len(self.text)):
                return self.last()
        return found

    def last(self) -> Result | None:
        """Return the last number of the text."""
        return Result(read(self.text_of(self.numbers[-1])), len(self.text), False) if self.numbers else None

    def text_of(self, number: int) -> str:
        """Return the text of the number that begins at a position."""
        return self.tokens[bisect_left(self.starts, number)].text

    def has_number(self, start: int, end: int) -> bool:
        """Return True if a number begins within a part of the text."""
        i = bisect_left(self.numbers, start)
        return i < len(self.numbers) and self.numbers[i] < end
