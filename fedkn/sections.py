"""What the tables of a configuration are made of: types of settings, and how they are checked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from fedkn.errors import UserError, unknown_name
from fedkn.options import Options
from fedkn.tables import shown

__all__ = [
    "Finite",
    "Fraction",
    "NonNegative",
    "Positive",
    "Scalar",
    "Section",
    "check_keys",
    "option_tables",
    "validated",
]

Scalar = str | int | float | bool


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("must be a finite number")
    return value


Finite = Annotated[float, AfterValidator(_finite)]
Positive = Annotated[float, Field(gt=0), AfterValidator(_finite)]
NonNegative = Annotated[float, Field(ge=0), AfterValidator(_finite)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
_NUMBERS = (int, float)


class Section(BaseModel):
    """A table of the configuration: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_as_number(cls, value: object, info: ValidationInfo) -> object:
        # Pydantic takes true for 1, also where a word may stand for a number.
        annotation = cls.model_fields[info.field_name or ""].annotation
        choice = get_origin(annotation) in (Union, UnionType) and bool not in get_args(annotation)
        number = annotation in _NUMBERS or choice
        if isinstance(value, bool) and number:
            raise ValueError(f"must be a number, not {str(value).lower()}")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _no_integer_beyond_64_bits(cls, value: object) -> object:
        # Flower's run config cannot carry it, nor a checkpoint.
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError("must be a whole number of at most 64 bits")
        return value


SectionT = TypeVar("SectionT", bound=Section)


def validated(section: type[SectionT], values: Mapping[str, Any]) -> SectionT:
    """Return `section` made of nested `values`, or raise UserError in one readable line."""
    try:
        return section.model_validate(dict(values))
    except ValidationError as error:
        raise _first_problem(section, error) from None


def check_keys(section: type[BaseModel], flat: Iterable[str]) -> None:
    """Raise UserError for the first dotted key that `section` lacks, naming the nearest."""
    valid = list(_keys(section))
    tables = {key.rpartition(".")[0] for key in valid} - {""}
    for key in flat:
        if key in tables:
            raise UserError(f"'{key}' is a table of settings, not a setting: give {key}.… = value")
        if key not in valid:
            raise unknown_name("configuration key", key, valid)


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _keys(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def option_tables(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the keys of type `Options`."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from option_tables(kind, f"{prefix}{name}.")
        elif field.metadata and field.metadata == _OPTIONS_METADATA:
            yield f"{prefix}{name}"


_OPTIONS_METADATA = list(get_args(Options)[1:])


def _first_problem(section: type[BaseModel], error: ValidationError) -> UserError:
    problem = error.errors(include_url=False)[0]
    valid = list(_keys(section))
    # Unions add the name of the branch that failed to the location: keep only what are keys.
    parts = [str(part) for part in problem["loc"]]
    while len(parts) > 1 and ".".join(parts) not in valid:
        parts.pop()
    message = problem["msg"].removeprefix("Value error, ")
    return UserError(
        f"{'.'.join(parts)} = {shown(problem['input'])}: {message[0].lower()}{message[1:]}"
    )
