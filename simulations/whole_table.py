"""A table for the terminal of which nothing is cut, however narrow the terminal."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Column, Table

__all__ = ["WholeTable"]

_WORD, _STUMP = 16, 4
_ENDLESS = 100_000


@dataclass(frozen=True)
class _Size:
    """How many characters a column asks for: at most, at least, and where even that is too much."""

    most: int
    least: int
    last: int


class WholeTable(Table):
    """A table whose texts are wrapped where it is too wide, and whose numbers never are.

    Numbers are what a column justified to the right holds. Where they do not fit, the columns that
    are left over follow below, in a table with the first `keys` columns before them.
    """

    keys = 1

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the table, in as many parts as it needs."""
        endless = options.update(max_width=_ENDLESS)
        sizes = [self._size(console, endless, column) for column in self.columns]
        whole = Measurement.get(console, endless, self).maximum
        borders = whole - sum(size.most for size in sizes)
        parts = [*_parts(sizes, min(self.keys, len(sizes)), borders, options.max_width)]
        for part in parts:
            own = [sizes[index] for index in part]
            room = options.max_width - _borders(borders, len(part), len(sizes))
            table = self._part(part, _widths(own, room))
            table.title = self.title if part is parts[0] else None
            table.caption = self.caption if part is parts[-1] else None
            yield from Table.__rich_console__(table, console, options)

    def _size(self, console: Console, options: ConsoleOptions, column: Column) -> _Size:
        heads = [column.header] if self.show_header else []
        foots = [column.footer] if self.show_footer else []
        cells = [Measurement.get(console, options, cell) for cell in (*column.cells, *foots)]
        named = [Measurement.get(console, options, head) for head in heads]
        most = max((one.maximum for one in cells + named), default=1)
        word = max((one.minimum for one in cells), default=1)
        head = max((min(one.minimum, _WORD) for one in named), default=1)
        if column.justify == "right":
            return _Size(most, max(word, head), word)
        least = max(min(word, _WORD), head)
        return _Size(most, least, min(least, _STUMP))

    def _part(self, part: Sequence[int], widths: Sequence[int]) -> Table:
        table = copy.copy(self)
        table.columns, table.rows = [], []
        for index, width in zip(part, widths, strict=True):
            column = self.columns[index]
            table.add_column(
                column.header,
                column.footer,
                header_style=column.header_style,
                footer_style=column.footer_style,
                style=column.style,
                justify=column.justify,
                vertical=column.vertical,
                # What still has no room is broken, not left out.
                overflow="fold",
                width=width,
            )
        cells = [[*self.columns[index].cells] for index in part]
        for number, row in enumerate(self.rows):
            table.add_row(
                *(column[number] for column in cells), style=row.style, end_section=row.end_section
            )
        return table


def _parts(sizes: Sequence[_Size], keys: int, borders: int, width: int) -> Iterator[list[int]]:
    """Yield the indices of the columns of each part, those of the keys first."""
    if sum(size.least for size in sizes) + borders <= width:
        yield [*range(len(sizes))]
        return
    part = [*range(keys)]
    for index in range(keys, len(sizes)):
        needed = sum(sizes[one].least for one in (*part, index))
        if len(part) > keys and needed + _borders(borders, len(part) + 1, len(sizes)) > width:
            yield part
            part = [*range(keys)]
        part.append(index)
    yield part


def _borders(whole: int, columns: int, of: int) -> int:
    """Return at least what is between and around `columns`, where all have `whole` of it."""
    return whole if columns == of else -(-whole * columns // of) + 1


def _widths(sizes: Sequence[_Size], room: int) -> list[int]:
    """Return the widths of columns of `sizes`, the widest made narrower until they fit."""
    widths = [size.most for size in sizes]
    for bounds in ([size.least for size in sizes], [size.last for size in sizes]):
        while sum(widths) > room:
            spare = [i for i, bound in enumerate(bounds) if widths[i] > bound]
            if not spare:
                break
            widths[max(spare, key=widths.__getitem__)] -= 1
    return widths
