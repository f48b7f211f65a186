"""What a normalizer is: a layer factory, a federation rule, and a statement of its needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, ClassVar, Self

from fedkn.normalizers.factory import LayerFactory
from fedkn.normalizers.needs import Needs
from fedkn.normalizers.rule import Federated

__all__ = ["Normalizer"]


class Normalizer(LayerFactory, Federated, Needs):
    """A configured normalizer. Subclasses are frozen dataclasses; their fields are the options."""

    title: ClassVar[str]
    """How a report calls it."""
    paper: ClassVar[str] = ""
    """Where it comes from."""
    statistics: ClassVar[str] = ""
    """What its statistics are taken over; empty where it takes none."""
    not_for: ClassVar[str] = ""
    """When it does not help: one sentence, from its paper or from what was measured here."""
    rule_settings: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
    """Settings of its options that between them show every federation rule it can have."""

    @property
    def label(self) -> str:
        """Its title and the settings that its results depend on, to stand beside every figure."""
        return self.title

    @classmethod
    def options(cls) -> dict[str, Any]:
        """Return the defaults of its options, by name."""
        return {field.name: field.default for field in fields(cls)} if is_dataclass(cls) else {}

    @property
    def settings(self) -> dict[str, Any]:
        """The values of its options, by name."""
        return {name: getattr(self, name) for name in self.options()}

    def with_settings(self, **settings: Any) -> Self:
        """Return this normalizer with those of `settings` that it has an option for.

        So a network passes on what it publishes, such as a dropout, whatever the normalizer is.
        """
        known = {name: value for name, value in settings.items() if name in self.options()}
        return replace(self, **known) if is_dataclass(self) else self
