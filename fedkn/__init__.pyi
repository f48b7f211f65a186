from fedkn.models import convert as convert
from fedkn.observer import Event as Event
from fedkn.observer import Observer as Observer
from simulations.api.result import Result as Result
from simulations.api.result import load as load
from simulations.api.running import compare as compare
from simulations.api.running import resume as resume
from simulations.api.running import run as run

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

__version__: str
