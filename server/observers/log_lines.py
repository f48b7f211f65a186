"""A run's progress as lines of Flower's log, which ``flwr run --stream`` and a fleet's log show."""

from __future__ import annotations

import logging

from fedkn.observer import Event, Observer

__all__ = ["LogLines"]

_LOG = logging.getLogger("flwr")


class LogLines(Observer):
    """A line for every round and every evaluation."""

    _metric = "value"

    def run_begins(self, event: Event) -> None:
        """Say from where a run goes on, and learn what its evaluations say."""
        self._metric = event["task"]["metric"]
        if event.kind == "resume":
            _LOG.info("resuming after round %d", event["round"])

    def round_ends(self, event: Event) -> None:
        """Say how many updates a round had, and how long it took."""
        _LOG.info(
            "round %d/%d: %d of %d updates, %.1f s",
            *(event["round"], event.config.rounds, event["updates"], len(event["cohort"])),
            event["seconds"],
        )

    def evaluation(self, event: Event) -> None:
        """Say how good the global model is."""
        _LOG.info(
            "round %d: %s %.4f on %s examples",
            *(event["round"], self._metric, event["metrics"][self._metric], event["split"]),
        )

    def client_evaluation(self, event: Event) -> None:
        """Say how good the clients' own models are."""
        if event["clients"]:
            _LOG.info(
                "clients' own models on their own examples: %s %.4f, worst tenth %.4f",
                *(self._metric, event["mean"], event["worst_tenth"]),
            )
