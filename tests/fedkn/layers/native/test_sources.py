"""The C++ sources: the same in a checkout as in a bundle of Python files alone."""

from __future__ import annotations

import re
from pathlib import Path
from unittest import mock

from fedkn.layers.native import bundled, sources
from fedkn.layers.native.__main__ import python_module


def test_the_bundled_sources_are_the_files() -> None:
    remedy = "run: python -m fedkn.layers.native"
    assert bundled.sources() == sources.files(), remedy
    assert list(bundled.sources()) == sorted(sources.files())
    text = Path(bundled.__file__).read_text(encoding="utf-8")
    assert python_module(sources.files()) == text, remedy


def test_where_there_are_no_files_the_bundled_ones_are_compiled() -> None:
    with mock.patch.object(sources, "files", return_value={}):
        assert sources.sources() == bundled.sources()
    edited = {sources.MAIN: "int main() {}\n"}
    with mock.patch.object(sources, "files", return_value=edited):
        assert sources.sources() == edited


def test_every_source_is_reached_from_the_one_that_is_compiled() -> None:
    texts, reached, left = sources.files(), set(), [sources.MAIN]
    while left:
        name = left.pop()
        if name not in reached:
            reached.add(name)
            left += re.findall(r'#include "(.+)"', texts[name])
    assert reached == set(texts)
