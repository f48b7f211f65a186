from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fedkn.text import printable


def test_shows_ordinary_text_as_it_is():
    assert printable("Großes Bild (2) – 日本") == "Großes Bild (2) – 日本"
    assert printable(ValueError("no")) == "no"


def test_writes_out_what_a_terminal_would_act_on():
    assert printable("a\x1b[2Jb") == "a\\x1b[2Jb"
    assert printable("\u202egnp.exe") == "\\u202egnp.exe"
    assert printable(b"caf\xe9".decode("utf-8", "surrogateescape")) == "caf\\udce9"


def test_is_one_line():
    assert printable("one\nERROR: forged\r\u2028three\tfour") == "one ERROR: forged three four"
    assert printable(" \n\u2028") == ""


def test_cuts_what_is_long_and_marks_it():
    assert printable("x" * 10_000_000, 20) == "x" * 19 + "…"
    assert printable("x" * 20, 20) == "x" * 20
    assert printable("x" + " " * 1000 + "y", 20).endswith("…")


@given(st.text(st.characters(), max_size=300), st.integers(2, 60))
def test_whatever_it_is_given_can_be_printed(text: str, limit: int):
    line = printable(text, limit)
    assert len(line) <= limit
    assert line.isprintable()
    line.encode()
