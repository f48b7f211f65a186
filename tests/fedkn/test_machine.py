import os

import pytest

from fedkn.machine import processor, usable_cores


def test_cores_are_those_that_this_process_is_bound_to() -> None:
    all_of_them = os.sched_getaffinity(0)
    assert usable_cores() == len(all_of_them)
    os.sched_setaffinity(0, {min(all_of_them)})
    try:
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, all_of_them)


def test_cores_where_a_process_cannot_be_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cores() == os.cpu_count()
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores() == 1


def test_a_processor_has_a_name_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert processor()

    def refused(*arguments: object, **options: object) -> str:
        raise FileNotFoundError(2, "no /proc here")

    monkeypatch.setattr("pathlib.Path.read_text", refused)
    monkeypatch.setattr("platform.processor", lambda: "")
    assert processor() == "unknown"
