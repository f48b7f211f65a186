"""What a process keeps of data in memory, forgotten: a new process would read them anew."""

from __future__ import annotations

from clients import session
from fedkn import experiment

__all__ = ["forget_data"]


def forget_data() -> None:
    """Let this process read every source again, as one that was started just now would."""
    for cached in (
        experiment._source,
        experiment._split,
        experiment._federated_data,
        experiment._summary,
        experiment._fingerprint,
        session._session_of,
        session._session,
    ):
        cached.cache_clear()
