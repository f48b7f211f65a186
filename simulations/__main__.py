"""``python -m simulations``: the command line, where ``fedkn`` is not on the path."""

from __future__ import annotations

from simulations.cli import main

if __name__ == "__main__":
    main()
