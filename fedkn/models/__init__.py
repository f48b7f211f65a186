"""Networks by name, each buildable with any normalizer, and what can be done to other models."""

from fedkn.models.builder import build, names
from fedkn.models.changes import Conversion
from fedkn.models.conversion import convert
from fedkn.models.folding import fold_batch_norm
from fedkn.models.initial import initialize
from fedkn.models.published import load_published_weights

__all__ = [
    "Conversion",
    "build",
    "convert",
    "fold_batch_norm",
    "initialize",
    "load_published_weights",
    "names",
]
