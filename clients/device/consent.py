"""What a device's owner lets runs do with its images: the table ``[consent]`` of device.toml."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from fedkn.config import ExperimentConfig
from fedkn.errors import UserError, unknown_name
from fedkn.models import names as model_names
from fedkn.references import is_reference, registered
from fedkn.sections import Section, validated
from fedkn.text import printable
from fedkn.training.privacy_spent import PrivacySpent

__all__ = ["Consent", "node_consent"]


class Consent(Section):
    """What the owner agrees to; as it is here, to every run.

    In the node's config the keys have hyphens: ``consent-private-only``, ….
    """

    private_only: bool = Field(
        False,
        description="refuse runs without differential privacy of examples whose noise the server "
        "cannot know: privacy.mechanism 'example' with privacy.secret",
    )
    max_epsilon: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        0.0,
        description="epsilon that all runs together may ever spend (0: no cap); private_only too",
    )
    delta: Annotated[float, Field(gt=0, lt=1)] = Field(
        1e-5, description="at which max_epsilon is meant, whatever delta a run names"
    )
    models: str = Field(
        "",
        description="models that may be trained, with commas, somebody's own as "
        "package.module:name (empty: any)",
    )
    max_rounds: int = Field(0, ge=0, description="refuse runs of more rounds (0: any number)")
    evaluation: bool = Field(
        True,
        description="let runs evaluate on images kept back for that, whose results are exact",
    )

    def check_names(self) -> None:
        """Raise UserError if `models` names one that there is not."""
        known = (*model_names(), *registered("model"))
        for name in self._models():
            if name not in known and not is_reference(name):
                raise unknown_name("model in consent.models", name, known)

    def allow_run(self, config: ExperimentConfig) -> None:
        """Raise UserError, with what the owner has decided, unless `config` may be run here."""
        privacy = config.privacy
        if self.private_only or self.max_epsilon:
            key = "private_only" if self.private_only else "max_epsilon"
            if privacy.mechanism != "example" or not privacy.noise_multiplier:
                raise _refused(
                    key,
                    "it has no differential privacy of examples",
                    "privacy.mechanism = 'example' and noise",
                )
            if not privacy.secret:
                raise _refused(
                    key, "the server can tell its noise from the seed", "privacy.secret = true"
                )
        allowed = self._models()
        if allowed and config.model.name not in allowed:
            raise _refused(
                "models",
                f"it trains '{printable(config.model.name, 60)}'",
                f"one of {', '.join(allowed)}",
            )
        if self.max_rounds and config.rounds > self.max_rounds:
            raise _refused(
                "max_rounds", f"it has {config.rounds} rounds", f"at most {self.max_rounds}"
            )
        if not self.evaluation and config.evaluation.client_fraction:
            raise _refused(
                "evaluation",
                "it evaluates on this device's images",
                "evaluation.client_fraction = 0",
            )

    def allow_spending(self, after: PrivacySpent) -> None:
        """Raise UserError if that is more than the owner's `max_epsilon`.

        Args:
            after: what all runs will have spent with the next update.
        """
        if not self.max_epsilon:
            return
        epsilon = after.epsilon(self.delta)
        if epsilon > self.max_epsilon:
            raise _refused(
                "max_epsilon",
                f"this round would make epsilon {epsilon:.4g} for life, at delta {self.delta:g}",
                f"at most {self.max_epsilon:g}",
            )

    def node_config(self) -> dict[str, bool | int | float | str]:
        """Return what was decided, other than to agree, as entries of the node's config."""
        given = self.model_dump(exclude_defaults=True)
        return {_PREFIX + name.replace("_", "-"): value for name, value in given.items()}

    def _models(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.models.split(",") if name.strip())


def node_consent(node_config: Mapping[str, Any]) -> Consent:
    """Return the consent in a node's config.

    Raises:
        UserError: an entry that is unknown or impossible. What an owner meant to forbid shall not
            be allowed because of a slip.
    """
    given = {
        key.removeprefix(_PREFIX).replace("-", "_"): value
        for key, value in node_config.items()
        if key.startswith(_PREFIX)
    }
    if not given:
        return _NOTHING_FORBIDDEN
    if unknown := sorted(given.keys() - Consent.model_fields.keys()):
        raise unknown_name("entry of [consent]", unknown[0], Consent.model_fields)
    consent = validated(Consent, given)
    consent.check_names()
    return consent


_PREFIX = "consent-"
_NOTHING_FORBIDDEN = Consent()


def _refused(key: str, why: str, wanted: str) -> UserError:
    return UserError(
        f"the owner of this device refuses the run (consent.{key}): {why}; agreed is {wanted}"
    )
