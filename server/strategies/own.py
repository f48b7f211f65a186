"""A user's own strategy, ours or Flower's in kind, held to what it must return."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from flwr.app import ConfigRecord
from flwr.serverapp.strategy import Strategy as FlwrStrategy

from fedkn.config import ExperimentConfig
from fedkn.errors import FedknError, UserError
from fedkn.options import read_options
from fedkn.references import find
from fedkn.text import printable
from fedkn.training import LocalRule
from server.gate.screening import Update
from server.strategies.base import Arrays, NoAggregate, Strategy
from server.strategies.fedavg import FedAvg
from server.strategies.flower import EVERY_NODE, FlowerStrategy

__all__ = ["OwnStrategy"]


class OwnStrategy(Strategy):
    """Asks somebody's own strategy, and takes nothing from it that the run could not go on with.

    ``strategy.name`` names one of these, which ``strategy.options`` are given to by keyword:

    - a class derived from `Strategy`, or a function that returns one: called with the config;
    - a class derived from Flower's ``flwr.serverapp.strategy.Strategy``: it is given the updates of
      a round as every strategy of Flower's is here (`FlowerStrategy`). What outlives a round is
      what its ``state()`` returns and its ``load_state(arrays)`` takes, if it has them;
    - a class derived from `LocalRule`, a client half, whose server half is FedAvg's.

    Raises:
        UserError: it cannot be loaded or made, or is none of these.
    """

    def __init__(self, config: ExperimentConfig, parameters: Sequence[str] = ()) -> None:
        super().__init__(config)
        self._name = printable(config.strategy.name, 120)
        found = find("strategy", config.strategy.name, {})
        options = read_options(config.strategy.options)
        with self._asked("cannot be made"):
            self._strategy = self._made(found, config, options, parameters)

    def instructions(self, round_: int, parameters: Arrays, config: ConfigRecord) -> ConfigRecord:
        """Return what the strategy makes of `config`, in which it may add and not take away."""
        with self._asked("failed in instructions"):
            told = self._strategy.instructions(round_, parameters, config)
        if not isinstance(told, ConfigRecord) or any(told.get(k) != v for k, v in config.items()):
            raise UserError(
                f"strategy '{self._name}': instructions must return a ConfigRecord with all that "
                "it was given: ConfigRecord({**config, 'my-key': …})"
            )
        return told

    def control(self, parameters: Arrays) -> dict[str, np.ndarray]:
        """Return what the strategy sends beside the `parameters`."""
        with self._asked("failed in control"):
            given = self._strategy.control(parameters)
        if given:
            self._check(given, parameters, "control")
        return {name: np.asarray(value) for name, value in given.items()}

    def aggregate(
        self, round_: int, sent: Arrays, updates: Sequence[Update]
    ) -> dict[str, np.ndarray]:
        """Return the strategy's next parameters: all of those `sent`, in their shapes."""
        with self._asked("failed in aggregate"):
            # Copies: what its code does to them in place is no business of the round's.
            given = {name: value.copy() for name, value in sent.items()}
            made = self._strategy.aggregate(round_, given, updates)
        self._check(made, sent, "aggregate")
        return {name: np.asarray(made[name]) for name in sent}

    def state(self) -> dict[str, np.ndarray]:
        """Return what the strategy says must outlive a round."""
        with self._asked("failed in state"):
            state = self._strategy.state()
        for name, value in state.items():
            numbers = isinstance(value, np.ndarray) and value.dtype.kind in "fiub"
            if not isinstance(name, str) or not numbers:
                raise UserError(
                    f"strategy '{self._name}': state must return numbers in NumPy arrays by name, "
                    f"and '{printable(name, 60)}' is {type(value).__name__}"
                )
        # A round that comes to nothing is taken back, whatever its code did to these in place.
        return {name: value.copy() for name, value in state.items()}

    def load_state(self, arrays: Arrays) -> None:
        """Let the strategy go on from what `state` returned."""
        with self._asked("failed in load_state"):
            self._strategy.load_state({name: value.copy() for name, value in arrays.items()})

    def fields(self) -> dict[str, float]:
        """Return what the strategy adds to the log: finite numbers by name."""
        with self._asked("failed in fields"):
            fields = self._strategy.fields()
        for name, value in fields.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not isinstance(name, str) or not number or not math.isfinite(value):
                raise UserError(
                    f"strategy '{self._name}': fields must return finite numbers by name, and "
                    f"'{printable(name, 60)}' is {printable(value, 60)}"
                )
        return fields

    def _made(
        self,
        found: Any,
        config: ExperimentConfig,
        options: Mapping[str, Any],
        parameters: Sequence[str],
    ) -> Strategy:
        if isinstance(found, type) and issubclass(found, LocalRule):
            if options:
                raise UserError(
                    f"strategy '{self._name}' is a client half, which takes no strategy.options: "
                    "name a server half that tells its clients"
                )
            return FedAvg(config)
        if isinstance(found, type) and issubclass(found, FlwrStrategy):
            return _FlowersOwn(found(**_common(found), **options), parameters)
        made = found(config, **options) if callable(found) else found
        if isinstance(made, FlwrStrategy):
            return _FlowersOwn(made, parameters)
        if not isinstance(made, Strategy):
            raise UserError(
                f"strategy '{self._name}' is {printable(made, 80)}: it must be a class derived "
                "from server.strategies.base.Strategy, flwr.serverapp.strategy.Strategy or "
                "fedkn.training.LocalRule"
            )
        return made

    def _check(self, arrays: Any, like: Arrays, where: str) -> None:
        """Raise UserError unless `arrays` are floats of the names and shapes of `like`."""
        said = f"strategy '{self._name}': {where} must return an array for every parameter"
        if not isinstance(arrays, Mapping):
            raise UserError(f"{said}, by name, and returned {type(arrays).__name__}")
        if odd := sorted(map(str, set(arrays) ^ set(like))):
            raise UserError(f"{said} and no other: look at '{printable(odd[0], 120)}'")
        for name, value in arrays.items():
            array = np.asarray(value)
            if array.shape != like[name].shape or not np.issubdtype(array.dtype, np.floating):
                raise UserError(
                    f"{said}: '{name}' is {array.dtype} {array.shape} where it must be floating "
                    f"{like[name].shape}"
                )

    @contextmanager
    def _asked(self, failed: str) -> Iterator[None]:
        """Name the strategy in whatever its code raises, and the line that did."""
        try:
            yield
        except (FedknError, NoAggregate):
            raise
        except Exception as error:
            # Somebody's code runs, and may fail of anything.
            frame = inspect.trace()[-1]
            raise UserError(
                f"strategy '{self._name}' {failed}: {type(error).__name__}: "
                f"{printable(error, 200)} ({printable(frame.filename)}, line {frame.lineno})"
            ) from error


class _FlowersOwn(FlowerStrategy):
    """A user's strategy written for Flower, which may keep more than ours of Flower's do."""

    def state(self) -> dict[str, np.ndarray]:
        """Return what its ``state`` does, else Flower's momentum and moments."""
        own = getattr(self._strategy, "state", None)
        if own is None:
            return super().state()
        state: dict[str, np.ndarray] = own()
        return state

    def load_state(self, arrays: Arrays) -> None:
        """Give it to its ``load_state``."""
        own = getattr(self._strategy, "load_state", None)
        if own is None:
            super().load_state(arrays)
        else:
            own(dict(arrays))


def _common(strategy: type[FlwrStrategy]) -> dict[str, Any]:
    """Return the arguments by which Flower's strategies train every node, if it takes them."""
    taken = inspect.signature(strategy).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values()):
        return dict(EVERY_NODE)
    return {name: value for name, value in EVERY_NODE.items() if name in taken}
