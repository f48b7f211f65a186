"""Differential privacy of clients: clipped updates, a uniform mean, and Gaussian noise on it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    FedAvg,
)
from flwr.supercore.differential_privacy import (
    KEY_CLIPPING_NORM,
    KEY_NORM_BIT,
    compute_stdv,
)

from fedkn.averaging import summed
from fedkn.config import ExperimentConfig
from fedkn.errors import UserError
from fedkn.federation import EXAMPLES, TRAIN_LOSS
from fedkn.seeds import derive
from fedkn.stack import distances
from server.gate.screening import Update
from server.strategies.base import Arrays, Strategy
from server.strategies.flower import FlowerStrategy

__all__ = ["PrivateMean", "numpy_seeded"]

_CLIP_NORM = "clip_norm"

_AT_THE_NORM = 1 - 1e-3
"""From this part of the norm on, an update is taken for one that its client clipped: float32
tensors hold a small move of large weights to a few parts in 10^5."""


class PrivateMean(Strategy):
    """The mean of clipped updates with noise, by Flower's wrappers (arXiv 1710.06963, 1905.03871).

    Every update is clipped to norm C over the shared parameters together, averaged with equal
    weights, and N(0, (z C/n)^2) is added to every number, n the updates of the round and z
    ``privacy.noise_multiplier``. Nothing else of a client reaches the model.

    ``server_fixed``, ``client_fixed``: C is ``privacy.clip_norm``. ``…_adaptive``: C begins there
    and follows the median norm of the updates, which takes part of the noise's budget: z becomes
    (z^-2 - (2 b)^-2)^-1/2 with b = cohort/20, the deviation of the noise on the number of clients
    that were clipped. With ``client_…`` the clients clip; the server clips again what they send,
    so a client that does not clip gains nothing. Their half is
    `fedkn.training.update_clipping.ClippedUpdate`. Clients are told besides what the `strategy`
    tells them, whose aggregate is the plain mean that the noise is calibrated to.

    Flower's server-side wrappers divide by zero when a client sends back what it got, and do not
    clip 0-dimensional parameters: the clipping is ours, and the wrapper is Flower's client-side
    one, for server-side clipping as well. It assumes equal weights and as many updates as the
    cohort: it gets their mean, taken where they lie, as the one update, and the true number.

    Raises:
        UserError: the cohort is too small for the noise asked of adaptive clipping.
    """

    def __init__(
        self, config: ExperimentConfig, strategy: Strategy, parameters: Sequence[str]
    ) -> None:
        privacy = config.privacy
        self._strategy = strategy
        self._on_clients = privacy.mechanism.startswith("client_")
        self._seed = config.seed
        self._secret = privacy.secret
        self._applied: dict[str, float] = {}
        self._wrapper: DifferentialPrivacyClientSideFixedClipping | _Adaptive
        metrics: tuple[str, ...] = (EXAMPLES, TRAIN_LOSS)
        mean = FedAvg(min_train_nodes=1, min_available_nodes=1)
        if privacy.mechanism.endswith("_adaptive"):
            metrics = (*metrics, KEY_NORM_BIT)
            if privacy.noise_multiplier >= config.cohort / 10:
                raise UserError(
                    f"{privacy.mechanism} with privacy.noise_multiplier = "
                    f"{privacy.noise_multiplier:g} needs cohort > "
                    f"{10 * privacy.noise_multiplier:g}, got {config.cohort}: the count of clipped "
                    "clients, noised by cohort/20, would take all of it"
                )
            self._wrapper = _Adaptive(
                mean, privacy.noise_multiplier, config.cohort, privacy.clip_norm
            )
        else:
            self._wrapper = DifferentialPrivacyClientSideFixedClipping(
                mean, privacy.noise_multiplier, privacy.clip_norm, config.cohort
            )
        self._flower = FlowerStrategy(self._wrapper, parameters, metrics)

    def instructions(self, round_: int, parameters: Arrays, config: ConfigRecord) -> ConfigRecord:
        """Return `config`, with the clip norm in it where clients clip."""
        told = self._strategy.instructions(round_, parameters, config)
        told = self._flower.instructions(round_, parameters, ConfigRecord(dict(told)))
        if not self._on_clients:
            del told[KEY_CLIPPING_NORM]
        return told

    def aggregate(
        self, round_: int, sent: Arrays, updates: Sequence[Update]
    ) -> dict[str, np.ndarray]:
        """Return the noised mean of the clipped updates."""
        wrapper = self._wrapper
        wrapper.num_sampled_clients = len(updates)
        norm = wrapper.clipping_norm
        deviation = compute_stdv(wrapper.noise_multiplier, norm, len(updates))
        self._applied = {"clip_norm": norm, "noise_deviation": deviation}
        ends = [update.arrays for update in updates]
        lengths = distances(ends, sent, sent)
        parts = [min(1.0, norm / length) if length else 1.0 for length in lengths]
        moved = summed(
            ends, sent, lambda k, end, x: (end.double() - x) * (parts[k] / len(ends)), sent
        )
        with np.errstate(over="ignore"):
            mean = {name: np.asarray(x + moved[name], x.dtype) for name, x in sent.items()}
        limit = _AT_THE_NORM * norm if self._on_clients else norm
        if isinstance(wrapper, _Adaptive):
            wrapper.clipped = sum(length > limit for length in lengths)
        metrics = {EXAMPLES: 1, TRAIN_LOSS: 0.0, KEY_NORM_BIT: 0}
        seed = None if self._secret else derive(self._seed, "privacy-noise", round_)
        with numpy_seeded(seed):
            return self._flower.aggregate(round_, sent, [Update(0, mean, metrics)])

    def state(self) -> dict[str, np.ndarray]:
        """Return the clip norm, which adaptive clipping moves."""
        return {_CLIP_NORM: np.asarray(self._wrapper.clipping_norm)}

    def load_state(self, arrays: Arrays) -> None:
        """Restore the clip norm."""
        if _CLIP_NORM in arrays:
            self._wrapper.clipping_norm = float(arrays[_CLIP_NORM])

    def fields(self) -> dict[str, float]:
        """Return the norm to which updates were clipped and the deviation of the noise."""
        return dict(self._applied)


class _Adaptive(DifferentialPrivacyClientSideAdaptiveClipping):
    """Flower's, moved toward the quantile, and not before the noise is drawn.

    Flower 1.41 multiplies the norm by exp(-lr (b - g)) with b the part that WAS clipped, where
    arXiv 1905.03871, Section 2.1, has the part that was NOT: its norm runs away from the quantile,
    to zero or without bound. It also adapts the norm before it scales the noise by it, although
    the updates were clipped to the norm before.

    Attributes:
        clipped: how many of the round's updates were; the reply that it is given stands for all.
    """

    clipped = 0

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        self._next_norm = self.clipping_norm
        result = super().aggregate_train(server_round, replies)
        self.clipping_norm = self._next_norm
        return result

    def _noisy_fraction(self, count: int, total: int) -> float:
        del count, total
        fraction: float = super()._noisy_fraction(self.clipped, self.num_sampled_clients)
        return fraction

    def _geometric_update(self, clipped_fraction: float) -> None:
        used = self.clipping_norm
        super()._geometric_update(1 - clipped_fraction)
        self._next_norm, self.clipping_norm = self.clipping_norm, used


@contextmanager
def numpy_seeded(seed: int | None) -> Iterator[None]:
    """Seed NumPy's global generator inside the block and put it back as it was.

    Flower's wrappers draw from it. With None the seed comes from the operating system.
    """
    # The legacy functions, because it is their generator that Flower draws from.
    fresh = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed)))
    before = np.random.get_state()  # noqa: NPY002
    np.random.set_state(fresh.get_state())  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002
