"""Whatever a configuration holds, it is taken or refused in one line."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest

from fedkn.errors import FedknError, UserError
from fedkn.tables import read_toml
from server.deployment.fleet import Fleet
from simulations.commands.options import given
from simulations.comparison.grid import GridConfig

KEYS = sorted(GridConfig().flat())
VALUES = [
    *("-1", "0", "10000", "1e400", "1e308", "nan", "inf", "-inf", "true", '""', '"x"', '" 5 "'),
    *("[]", "[1]", "[[[[]]]]", "{}", "{a = {b = {c = 1}}}", "1979-05-27", "07:32:00", '"true"'),
    *('"\\u0000"', '"\\u001b[2J"', '"~nobody-here/x"', '"\U0001f600"', '"cuda:x"', '"meta"'),
    *("9" * 300, "-" + "9" * 300, "0x" + "f" * 5000, "9" * 4500, '"' + "x" * 100_000 + '"'),
]
FILES = {
    "utf-16": "rounds = 3\n".encode("utf-16"),
    "latin-1": b"name = '\xe9'\n",
    "nul": bytes(10),
    "a key twice": b"rounds = 1\nrounds = 2\n",
    "a table twice": b"[train]\n[train]\n",
    "nested lists": b"a = " + b"[" * 5000,
    "nested tables": b"a = " + b"{a=" * 5000,
    "a dotted key": b".".join([b"a"] * 2000) + b" = 1\n",
    "a long key": b"a" * 100_000 + b" = 1\n",
    "a long file": b"# " + b"x" * 1_000_001,
    "a list of tables": b"[[train]]\nbatch_size = 2\n",
    "a table that is a number": b"train = 3\n",
    "an empty key": b'"" = 2\n',
}


def check_one_line(refusal: BaseException) -> None:
    text = str(refusal)
    assert text.isprintable(), text[:200]
    assert len(text) < 2500


@pytest.mark.parametrize("key", KEYS)
def test_any_value_of_any_key_is_taken_or_refused(key: str, tmp_path: Path) -> None:
    file = tmp_path / "f.toml"
    for value in VALUES:
        file.write_text(f"{key} = {value}\n")
        try:
            GridConfig.single(read_toml(file)).flat()
        except FedknError as refusal:
            check_one_line(refusal)
        with suppress(FedknError):
            GridConfig.resolve(read_toml(file)).flat()


@pytest.mark.parametrize("key", KEYS)
def test_any_text_behind_set_is_taken_or_refused(key: str) -> None:
    for value in (
        "",
        "=",
        "a=b",
        "nan",
        "1e400",
        "9" * 5000,
        "\ud800",
        "\x00",
        "1\n2",
        ",,1",
        "[1]",
    ):
        try:
            GridConfig.single({}, given([f"{key}={value}"])).flat()
        except FedknError as refusal:
            check_one_line(refusal)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_configuration_is_refused(name: str, tmp_path: Path) -> None:
    for place in (tmp_path / "f.toml", tmp_path / "fleet.toml"):
        place.write_bytes(FILES[name])
    with pytest.raises(UserError) as refusal:
        GridConfig.single(read_toml(tmp_path / "f.toml"))
    check_one_line(refusal.value)
    with pytest.raises(UserError) as refusal:
        Fleet.open(tmp_path)
    check_one_line(refusal.value)


@pytest.mark.parametrize("path", ["nowhere", ".", "/dev/zero", "a\x00b", "x" * 5000, "\ud800"])
def test_what_is_no_file_is_refused(path: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read|not valid") as refusal:
        read_toml(tmp_path / path if path[0] not in "/\ud800" else path)
    assert "\n" not in str(refusal.value)


def test_a_mark_before_the_first_letter_is_borne(tmp_path: Path) -> None:
    (tmp_path / "f.toml").write_bytes(b"\xef\xbb\xbfrounds = 3\r\n")
    assert read_toml(tmp_path / "f.toml") == {"rounds": 3}


@pytest.mark.parametrize("key", ["format", "clients", "host", "port", "superlink_port"])
def test_any_value_in_a_fleets_file_is_taken_or_refused(key: str, tmp_path: Path) -> None:
    sound = {"format": "1", "clients": "2", "host": '"h"', "port": "8443", "superlink_port": "8444"}
    for value in VALUES:
        rows = sound | {key: value}
        text = "".join(f"{name} = {of}\n" for name, of in rows.items())
        (tmp_path / "fleet.toml").write_text(text)
        with suppress(UserError):
            fleet = Fleet.open(tmp_path)
            assert 1 <= fleet.clients <= 100_000
            assert os.fsencode(fleet.path) == os.fsencode(tmp_path)
