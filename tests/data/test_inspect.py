"""Tokens as text: characters that are split over tokens."""

from spo_ray.data.inspect import EXCERPT, _tokens


class Bytes:
    """A tokenizer whose tokens are bytes, as those that byte-level vocabularies fall back to."""

    all_special_ids = (0,)

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


class Chat:
    tokenizer, end_id = Bytes(), 0


def test_characters_of_several_tokens_are_shown_whole():
    text = "한국어 🙂 a"
    shown = _tokens(Chat, list(text.encode()), ("green", "red"))
    assert shown.plain == text
    assert len(shown.spans) == len(text)  # each with the style of its last token


def test_a_broken_character_does_not_hide_what_follows():
    assert _tokens(Chat, [0xED, 0x95, 0x41], ("", "")).plain == "\ufffdA"
    assert _tokens(Chat, [0x41, 0xED], ("", "")).plain == "A\ufffd"
    long = _tokens(Chat, [0x41] * (EXCERPT - 1) + [0xED] + [0x42] * (EXCERPT + 7), ("", "")).plain
    assert long == "A" * (EXCERPT - 1) + "\ufffd ... 7 tokens ... " + "B" * EXCERPT
