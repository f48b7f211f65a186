"""Lets several clients meet where they train, so that they train together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from clients.trainer import Passes, Trained, Wanted

__all__ = ["gathered"]

AnswerT = TypeVar("AnswerT")


def gathered(
    clients: Sequence[Passes[AnswerT]],
    train: Callable[[Sequence[Wanted]], Sequence[Trained]],
) -> list[AnswerT | Exception]:
    """Return what each of the `clients` comes to, or what it raises, in their order.

    All passes that clients wait for at the same time are one `train`. Whatever that raises is
    raised by each of them.
    """
    found: dict[int, AnswerT | Exception] = {}
    waiting: dict[int, Wanted] = {}

    def go_on(place: int, step: Callable[[], Wanted]) -> None:
        try:
            waiting[place] = step()
        except StopIteration as end:
            found[place] = end.value
        except Exception as error:  # a client's own, of which its answer tells
            found[place] = error

    for place, client in enumerate(clients):
        go_on(place, partial(next, client))
    while waiting:
        now = dict(waiting)
        waiting.clear()
        try:
            results = train(list(now.values()))
        except Exception as error:  # each of them gets it, where it asked
            for place in now:
                go_on(place, partial(clients[place].throw, error))
            continue
        for place, result in zip(now, results, strict=True):
            go_on(place, partial(clients[place].send, result))
    return [found[place] for place in range(len(clients))]
