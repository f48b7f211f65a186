"""Logs of a fleet's programs as they are shown: what devices sent stands in them."""

from __future__ import annotations

from server.deployment.fleet import Fleet
from server.deployment.logs import last_lines


def test_lines_are_printable_bounded_and_no_more_than_were_written(tmp_path):
    fleet = Fleet(tmp_path, 2, "localhost", 8443, superlink_port=8444)
    log = fleet.log("superexec")
    log.parent.mkdir()
    forged = "INFO : round 1/1: 6 of 6 updates"
    said = f"\x1b[92mWARNING\x1b[0m refused: \x1b[2J x\u2028{forged}\x0b{forged} " + "k" * 10_000
    log.write_text(f'  File "x.py", line 3\n\n{said}\n', encoding="utf-8")
    first, second = last_lines(fleet, "superexec", 5)
    assert first == '  File "x.py", line 3'
    assert second.startswith(f"WARNING refused: \\x1b[2J x {forged} {forged} kkk")
    assert second.isprintable()
    assert len(second) <= 2000


def test_of_a_large_log_the_end_is_read(tmp_path):
    fleet = Fleet(tmp_path, 2, "localhost", 8443, superlink_port=8444)
    log = fleet.log("superexec")
    log.parent.mkdir()
    with log.open("wb") as file:
        file.truncate(1 << 33)  # sparse
        file.seek(0, 2)
        file.write(b"\nthe end\n")
    assert last_lines(fleet, "superexec", 1) == ["the end"]
