"""fedkn: federated, small-batch training with kernel normalization for PyTorch and Flower.

What is public is what `__all__` names; docs/api.md shows its use.
"""

import os
from importlib import import_module
from typing import Any

from fedkn.generators import generators_kept

__all__ = [
    "Event",
    "Observer",
    "Result",
    "__version__",
    "compare",
    "convert",
    "load",
    "resume",
    "run",
]

__version__ = "0.1.0"

# On some processors MKL's products depend on where in memory the numbers begin, unless it is told
# otherwise before the first of them: the same seed is to give the same bits in every engine.
os.environ.setdefault("MKL_CBWR", "AUTO")

# On demand: `import fedkn` must not cost the seconds that importing torch takes. By a name in a
# text, because what runs experiments stands above this package, which imports nothing of it: a
# device has the library alone. For type checkers and editors the names stand in __init__.pyi.
_WHERE = {
    "Event": "fedkn.observer",
    "Observer": "fedkn.observer",
    "Result": "simulations.api.result",
    "compare": "simulations.api.running",
    "convert": "fedkn.models",
    "load": "simulations.api.result",
    "resume": "simulations.api.running",
    "run": "simulations.api.running",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'fedkn' has no attribute '{name}'")
    try:
        with generators_kept():
            return getattr(import_module(_WHERE[name]), name)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"fedkn.{name} needs '{error.name}', which is not installed: "
            "pip install 'fedkn[simulation]'"
        ) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
