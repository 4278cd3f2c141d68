"""Text that grows token by token: nothing is shown too early, and the first stop text ends it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeut_compose.generate.text import Transcript


class Letters:
    """A tokenizer of one letter a token; 0 is the first half of a character."""

    def decode(self, ids: list[int]) -> str:
        return "".join("\ufffd" if i == 0 else chr(i) for i in ids)


def write(text: str, *stop: str, start: str = "Once") -> tuple[list[str], Transcript]:
    transcript = Transcript(Letters(), [ord(c) for c in start], stop, is_whole=not start)
    pieces = []
    for letter in text:
        pieces.append(transcript.add(ord(letter)))
        if transcript.has_stopped:
            break
    return [*pieces, transcript.finish()], transcript


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("a house", (), "a house"),
        ("a house. Then", (". ", "Then"), "a house"),
        ("a END b", ("<END>", "END"), "a"),
        ("a <EN", ("<END>",), "a <EN"),
        ("", ("x",), ""),
    ],
)
def test_stop_texts(text: str, stop: tuple[str, ...], shown: str) -> None:
    pieces, transcript = write(text, *stop)
    assert "".join(pieces) == transcript.text == shown
    assert transcript.has_stopped == (shown != text)


def test_the_beginning_of_a_stop_text_is_held_back() -> None:
    pieces, _ = write("ab<ENx", "<END>")
    assert pieces == ["a", "b", "", "", "", "<ENx", ""]


def test_half_a_character_is_held_back() -> None:
    transcript = Transcript(Letters(), [65], (), is_whole=False)
    assert [transcript.add(i) for i in (66, 0)] == ["B", ""]
    assert transcript.finish() == "\ufffd"


@given(st.text("abc", max_size=20), st.lists(st.text("abc", min_size=1, max_size=3), max_size=3))
def test_pieces_never_show_a_stop_text(text: str, stop: list[str]) -> None:
    pieces, transcript = write(text, *stop, start="")
    shown = "".join(pieces)
    assert shown == transcript.text
    assert not any(one in shown for one in stop)
    assert text.startswith(shown)
    ends = [text.find(one) for one in stop if one in text]
    assert transcript.has_stopped == bool(ends)
