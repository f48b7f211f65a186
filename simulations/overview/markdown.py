"""What docs/results.md repeats of the runs that the repository keeps, as blocks of markdown.

A block stands between ``<!-- NAME: make docs writes it -->`` and ``<!-- end of NAME -->``; what
stands around it is written by hand. NAME is TABLE-SCALE for a published table, the run folder's
name, quoted as in addresses, for a comparison, and power.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from urllib.parse import quote

from fedkn.text import printable
from simulations.overview.answers import published_sentences
from simulations.overview.page import Overview, command_of, has_results, powers_in, resume_of
from simulations.overview.reproduced import Reproduced
from simulations.report import formats
from simulations.report.effects import Effect
from simulations.report.endings import convergence
from simulations.report.power import Power, powers_of
from simulations.report.settings import display_name
from simulations.report.summary import RunSummary, Section
from simulations.report.tables import group_counts
from simulations.report.verdict import enumerated
from simulations.reproduction.outcome import differences, table_lines
from simulations.runs.axes import point_label

__all__ = ["POWER_BLOCK", "blocks", "filled"]

POWER_BLOCK = "power"
_WIDTH = 118


def blocks(of: Overview) -> dict[str, str]:
    """Return all blocks by name, those of tables first, that of the power last."""
    found = {f"{table.of.table.name}-{table.of.scale}": _table(table) for table in of.tables}
    found |= {
        quote(study.folder.path.name, safe=""): _study(study)
        for study in of.studies
        if has_results(study)
    }
    return found | {POWER_BLOCK: _powers(of)}


def filled(page: str, found: Mapping[str, str]) -> str:
    """Return `page` with every block written anew; those that it lacks come at its end.

    A block that nothing is known of any more, as of runs that are gone, is taken out.
    """
    seen = []

    def written(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in found:
            return ""
        seen.append(name)
        return _marked(name, found[name])

    page = _BLOCK.sub(written, page)
    lacking = [_marked(name, text) for name, text in found.items() if name not in seen]
    return "\n".join([page.rstrip("\n"), *(f"\n{block}".rstrip("\n") for block in lacking)]) + "\n"


_BLOCK = re.compile(
    r"<!-- (?P<name>[^\s:]+): make docs writes it -->\n.*?<!-- end of (?P=name) -->\n", re.DOTALL
)


def _marked(name: str, text: str) -> str:
    return f"<!-- {name}: make docs writes it -->\n\n{text}\n<!-- end of {name} -->\n"


def _table(table: Reproduced) -> str:
    of = table.of.table
    done = [outcome for outcome in table.outcomes if outcome.best.n]
    lines = [
        *_wrapped(f"**{of.title}, {table.of.scale} scale** ({of.paper})"),
        "",
        *("```", command_of(table), "```", ""),
    ]
    if done:
        lines += [*table_lines(of, done), ""]
    if left := [outcome.row.name for outcome in table.outcomes if not outcome.best.n]:
        lines += [*_wrapped(f"Without a result yet: {enumerated(left)}."), ""]
    minutes = sum(line.outcome.minutes for line in table.lines)
    told = [
        *published_sentences(table),
        of.part(table.of.scale).note,
        f"{minutes:.0f} minutes of one core by the clock in all.",
        *(f"{_capital(power.short())}." for power in powers_in(table)),
    ]
    lines += [*_wrapped(" ".join(told)), "", "Differences:", ""]
    for sentence in differences(of, table.outcomes):
        lines += _wrapped(sentence, "- ")
    return "\n".join([*lines, ""])


def _wrapped(text: str, start: str = "") -> list[str]:
    """Lines of markdown no longer than those that are written by hand; more in, after a `start`."""
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=start,
        subsequent_indent=" " * len(start) if start == "- " else start,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _study(study: RunSummary) -> str:
    lines = [*("```", printable(study.grid.command, 2000), resume_of(study), "```", "")]
    along = study.grid.axes and len(study.sections) > 1
    lines += _along_axes(study) if along else _by_section(study)
    seconds = sum(max(c.seconds or 0.0, sum(r.seconds for r in c.rounds)) for c in study.cells)
    notes = [
        f"Mean and 95% interval over seeds, {formats.count(study.ended, 'result cell')} of "
        f"{study.planned}; {seconds / 3600:.1f} hours of one core or device by the clock, with the "
        "search for learning rates.",
        *map(_escaped, convergence(study)),
        *(f"{_capital(power.short())}." for power in powers_of(study)),
    ]
    return "\n".join([*lines, *_wrapped(" ".join(notes)), ""])


def _by_section(study: RunSummary) -> Iterator[str]:
    """Verdict and table of each section."""
    for section in study.sections:
        if not any(entry.final for entry in section.entries.values()):
            continue
        if len(study.sections) > 1:
            yield from (f"**{_escaped(section.label)}**", "")
        for sentence in section.verdicts:
            yield from _wrapped(_escaped(sentence), "> ")
        yield from ("", *_grid(section), "")


def _along_axes(study: RunSummary) -> Iterator[str]:
    """What the axes show, the effects, and all results in one table: a section in a line."""
    for number, sentence in enumerate(study.axis_verdicts):
        yield from ([">"] if number else [])
        yield from _wrapped(_escaped(sentence), "> ")
    yield from [""] if study.axis_verdicts else []
    if study.effects:
        yield from (*_effects(study.effects), "")
    columns = list(study.sections[0].entries)
    several = len({section.partition for section in study.sections}) > 1
    heads = (f"{_escaped(name)}, batch {size}" for name, size in columns)
    yield _row(["all else", *heads])
    yield _row(["---"] * (1 + len(columns)))
    for section in study.sections:
        figures = (
            _figure(section, name, size, bold=False) + _marked_keeper(section, name)
            for name, size in columns
        )
        label = section.label if several else point_label(section.point)
        yield _row([_escaped(label), *figures])
    yield ""


def _effects(effects: Sequence[Effect]) -> Iterator[str]:
    yield _row(["averaged over all else", "better", "than", "by", "p, Holm"])
    yield _row(["---", "---", "---", "--:", "--:"])
    for effect in effects:
        test = effect.comparison
        by = formats.difference(test.difference, effect.metric)
        width = f" {formats.half_width(test, effect.metric)}" if test.n > 1 else ""
        mark = "**" if test.significant else ""
        yield _row(
            [
                _escaped(effect.label),
                *(_escaped(name or "empty") for name in (test.first, test.second)),
                f"{mark}{by}{width} {formats.difference_unit(effect.metric)}".rstrip() + mark,
                formats.p_value(test.p_holm),
            ]
        )


def _marked_keeper(section: Section, name: str) -> str:
    return f" {formats.KEEPS}" if name in section.keepers else ""


def _grid(section: Section) -> Iterator[str]:
    """The table normalizers x batch sizes, the best mean of each column in bold."""
    winners = {contest.batch_size: contest.winner for contest in section.contests}
    yield _row(["normalizer", *(f"batch {size}" for size in section.batch_sizes)])
    yield _row(["---"] * (1 + len(section.batch_sizes)))
    for name in _best_first(section):
        counts = max(
            (group_counts(e) for e in section.entries.values() if e.normalizer == name), default=0
        )
        yield _row(
            [
                _escaped(display_name(name, counts)) + _marked_keeper(section, name),
                *(
                    _figure(section, name, size, bold=winners[size] == name)
                    for size in section.batch_sizes
                ),
            ]
        )


def _figure(section: Section, name: str, size: int, *, bold: bool) -> str:
    entry = section.entries[name, size]
    if not entry.final:
        return "untrainable" if entry.untrainable else formats.NOTHING
    text = formats.interval(entry.accuracy, entry.metric)
    if entry.accuracy.n < entry.planned:
        text += f" ({entry.accuracy.n} of {entry.planned} seeds)"
    return f"**{text}**" if bold else text


def _best_first(section: Section) -> list[str]:
    order: dict[str, None] = {}
    for size in section.batch_sizes:
        order |= dict.fromkeys(entry.normalizer for entry in section.ranked(size))
    return list(order)


def _powers(of: Overview) -> str:
    """One line for each that has tests: what they find 4 times in 5, and the seeds of a point."""
    rows = [
        (_escaped(name), power)
        for name, powers in (
            *((study.label, powers_of(study)) for study in of.studies),
            *((f"{t.of.table.name}, {t.of.scale} scale", powers_in(t)) for t in of.tables),
        )
        for power in powers
    ]
    if not rows:
        return "No run kept in the repository has three seeds of two that compete.\n"
    head = ["run", "seeds", "pairs", "found 4 times in 5", "seeds needed"]
    lines = [_row(head), _row(["---", *["--:"] * (len(head) - 1)])]
    lines += [_row([name, *_power_cells(power)]) for name, power in rows]
    return "\n".join([*lines, ""])


def _power_cells(power: Power) -> Sequence[str]:
    fewest, most = power.seeds
    return (
        f"{fewest}" if fewest == most else f"{fewest} to {most}",
        f"{power.family}",
        power.found,
        power.asked_for,
    )


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    """Text of outside within markdown: on one line, and no markup."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", printable(text, 2000))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
