"""Whom a run is told to: its log, and the user's observers."""

from server.observers.audience import Audience
from server.observers.registry import check_observers, create_observers

__all__ = ["Audience", "check_observers", "create_observers"]
