"""Dividing the training examples among clients: every example goes to exactly one client."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fedkn.data.examples import Origins
from fedkn.errors import UserError, unknown_name
from fedkn.seeds import numpy_generator

__all__ = ["SCHEMES", "client_names", "label_counts", "partition"]

_DIRICHLET_TRIES = 10


def partition(
    labels: np.ndarray | Tensor,
    scheme: str,
    *,
    clients: int,
    seed: int,
    alpha: float = 0.3,
    shards_per_client: int = 2,
    labels_per_client: int = 2,
    sigma: float = 1.0,
    minimum: int = 1,
    classed: bool = True,
    origins: Origins | None = None,
) -> list[np.ndarray]:
    """Divide the examples among `clients`; none is dropped and none is shared.

    Schemes
    -------
    iid
        Sizes that differ by at most one, examples at random.
    dirichlet
        Label distribution skew. The examples of each class are divided in proportions drawn from
        a symmetric Dirichlet(`alpha`) over the clients, so sizes differ too: Yurochkin et al.,
        ICML 2019, arXiv 1905.12022, Sec. 4. (Hsu et al. 2019, arXiv 1909.06335, draw the classes
        of each client instead, with equal sizes.) Up to ten draws are made until one satisfies
        `minimum`; failing that, the draw whose smallest client is largest is repaired as below.
    shards
        The examples, sorted by label, are cut into ``clients * shards_per_client`` shards of equal
        size (to within one) and each client gets `shards_per_client` at random: McMahan et al.,
        AISTATS 2017, arXiv 1602.05629, Sec. 3.
    quantity
        Sizes proportional to exp(`sigma` z), z standard normal; labels independent of the client.
    labels
        Every client has exactly `labels_per_client` of the labels, the literature's "#C = k": one
        each in turn, the others at random, and the examples of a label are divided equally, at
        random, among the clients that have it: Li, Diao, Chen and He, ICDE 2022, arXiv 2102.02079,
        Sec. 4.1. (Where clients are fewer than labels, those that no client's turn reached are
        dealt before the others are drawn, so that no example is left out.)
    natural
        Each of the data's own clients (`origins`) is a client and holds what is its.
    domains
        Feature shift: each of the data's own domains (`origins`) is divided, at random and equally,
        among as many clients as every other; client i is of domain i modulo their number: as in Li,
        Jiang, Zhang, Kamp and Dou, ICLR 2021, arXiv 2102.07623 (FedBN), Sec. 5.

    Where a client is left with fewer than `minimum` examples, it is given random examples of
    whichever client then holds most, one at a time. That would give it other labels, or another's
    examples, in the last three schemes, which are refused instead.

    Parameters
    ----------
    labels
        Integer labels (N,); any where the examples have none and `classed` is False.
    scheme
        One of `SCHEMES`; a setting of another scheme has no effect.
    seed
        The draw is a pure function of it, the labels and the settings.

    Returns
    -------
    list of `clients` int64 arrays
        The sorted indices of each client's examples.

    Raises
    ------
    UserError
        Unknown scheme, or settings out of range or asking for more examples than there are; the
        message names the setting (`partition.clients`, `partition.minimum`, …).
    """
    if scheme not in _SCHEMES:
        raise unknown_name("partition scheme", scheme, _SCHEMES)
    labels = np.asarray(labels)
    settings = _Settings(clients, alpha, shards_per_client, labels_per_client, sigma, minimum)
    if scheme in _BY_CLASS and not classed:
        raise UserError(
            f"partition.scheme '{scheme}' goes by classes, and these examples have none: use iid "
            "or quantity, or natural where the data say whose they are"
        )
    if scheme not in _BY_ORIGIN:
        _check_room(len(labels), settings)
    rng = numpy_generator(seed, "partition", scheme)
    kinds = _origins(scheme, origins) if scheme in _BY_ORIGIN else labels
    parts = _SCHEMES[scheme](kinds, settings, rng)
    if scheme in _AS_THEY_ARE:
        _check_sizes(scheme, parts, minimum)
    else:
        parts = _repaired(parts, minimum, rng)
    return [np.sort(part) for part in parts]


def client_names(scheme: str, clients: int, origins: Origins | None) -> tuple[str, ...]:
    """Return whose examples each client has, or of which domain; empty where that says nothing."""
    if origins is None or scheme not in _BY_ORIGIN:
        return ()
    names = [origins.names[one] for one in np.unique(origins.ids.numpy())]
    return tuple(names[client % len(names)] for client in range(clients))


def label_counts(
    labels: np.ndarray | Tensor, parts: Sequence[np.ndarray], num_classes: int
) -> np.ndarray:
    """Return how many examples of each class each client holds, int64 (clients, num_classes)."""
    labels = np.asarray(labels)
    counts = [np.bincount(labels[part], minlength=num_classes) for part in parts]
    return np.array(counts, dtype=np.int64).reshape(len(parts), num_classes)


@dataclass(frozen=True)
class _Settings:
    clients: int
    alpha: float
    shards_per_client: int
    labels_per_client: int
    sigma: float
    minimum: int


_Scheme = Callable[[np.ndarray, _Settings, np.random.Generator], list[np.ndarray]]


def _check_room(examples: int, settings: _Settings) -> None:
    for name, value in (("clients", settings.clients), ("minimum", settings.minimum)):
        if value < 1:
            raise UserError(f"partition.{name} must be at least 1, got {value}")
    needed = settings.clients * settings.minimum
    if needed > examples:
        raise UserError(
            f"{settings.clients} clients with at least {settings.minimum} examples each need "
            f"{needed} examples, but there are {examples}: "
            "lower partition.clients or partition.minimum"
        )


def _iid(labels: np.ndarray, settings: _Settings, rng: np.random.Generator) -> list[np.ndarray]:
    return np.array_split(rng.permutation(len(labels)), settings.clients)


def _dirichlet(
    labels: np.ndarray, settings: _Settings, rng: np.random.Generator
) -> list[np.ndarray]:
    if not 1e-6 <= settings.alpha <= 1e6:
        raise UserError(f"partition.alpha must be in 1e-6..1e6, got {settings.alpha}")
    best: list[np.ndarray] = []
    for _ in range(_DIRICHLET_TRIES):
        parts = _dirichlet_draw(labels, settings, rng)
        if not best or _smallest(parts) > _smallest(best):
            best = parts
        if _smallest(best) >= settings.minimum:
            break
    return best


def _dirichlet_draw(
    labels: np.ndarray, settings: _Settings, rng: np.random.Generator
) -> list[np.ndarray]:
    order = rng.permutation(len(labels))
    pieces: list[list[np.ndarray]] = [[] for _ in range(settings.clients)]
    for label in np.unique(labels):
        members = order[labels[order] == label]
        shares = rng.dirichlet(np.full(settings.clients, settings.alpha))
        cuts = np.rint(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
        for own, piece in zip(pieces, np.split(members, cuts), strict=True):
            own.append(piece)
    return [np.concatenate(own) for own in pieces]


def _shards(labels: np.ndarray, settings: _Settings, rng: np.random.Generator) -> list[np.ndarray]:
    if settings.shards_per_client < 1:
        raise UserError(
            f"partition.shards_per_client must be at least 1, got {settings.shards_per_client}"
        )
    count = settings.clients * settings.shards_per_client
    if count > len(labels):
        raise UserError(
            f"{settings.clients} clients with {settings.shards_per_client} shards each need "
            f"{count} shards, but there are {len(labels)} examples: "
            "lower partition.shards_per_client or partition.clients"
        )
    order = rng.permutation(len(labels))
    shards = np.array_split(order[np.argsort(labels[order], kind="stable")], count)
    dealt = rng.permutation(count).reshape(settings.clients, settings.shards_per_client)
    return [np.concatenate([shards[index] for index in hand]) for hand in dealt]


def _quantity(
    labels: np.ndarray, settings: _Settings, rng: np.random.Generator
) -> list[np.ndarray]:
    if not (math.isfinite(settings.sigma) and settings.sigma >= 0):
        raise UserError(f"partition.sigma must be a finite number >= 0, got {settings.sigma}")
    exponents = settings.sigma * rng.standard_normal(settings.clients)
    # Relative to the largest, so that no sigma overflows.
    shares = np.exp(exponents - exponents.max())
    cuts = np.rint(np.cumsum(shares / shares.sum())[:-1] * len(labels)).astype(np.int64)
    return np.split(rng.permutation(len(labels)), cuts)


def _labels(labels: np.ndarray, settings: _Settings, rng: np.random.Generator) -> list[np.ndarray]:
    present = np.unique(labels)
    clients, each = settings.clients, settings.labels_per_client
    if not 1 <= each <= len(present):
        raise UserError(
            f"partition.labels_per_client must be in 1..{len(present)}, the labels that there are "
            f"examples of, got {each}"
        )
    if clients * each < len(present):
        raise UserError(
            f"{clients} clients with {each} labels each leave some of {len(present)} labels to "
            "nobody: raise partition.labels_per_client or partition.clients"
        )
    has = _dealt(clients, len(present), each, rng)
    own: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for place, label in enumerate(present):
        members = rng.permutation(np.flatnonzero(labels == label))
        owners = rng.permutation(np.flatnonzero(has[:, place]))
        if len(members) < len(owners):
            raise UserError(
                f"label {label} has {len(members)} examples and was given to {len(owners)} "
                "clients: lower partition.clients or partition.labels_per_client"
            )
        for client, piece in zip(owners, np.array_split(members, len(owners)), strict=True):
            own[client].append(piece)
    return [np.concatenate(pieces) for pieces in own]


def _dealt(clients: int, labels: int, each: int, rng: np.random.Generator) -> np.ndarray:
    """Return which client has which label, bool (clients, labels): each label at least one."""
    has = np.zeros((clients, labels), dtype=bool)
    has[np.arange(clients), np.arange(clients) % labels] = True
    nobodys = rng.permutation(np.flatnonzero(~has.any(0)))
    has[np.arange(len(nobodys)) % clients, nobodys] = True
    for own in has:
        missing = each - int(own.sum())
        own[rng.choice(np.flatnonzero(~own), missing, replace=False)] = True
    return has


def _origins(scheme: str, origins: Origins | None) -> np.ndarray:
    if origins is None:
        raise UserError(
            f"partition.scheme '{scheme}' needs data that say whose each example is, or of which "
            "domain: source digits_domains, client_folders (ROOT/CLIENT/CLASS/*), an array "
            "'clients' in an .npz, or 'clients' from a source of your own"
        )
    return origins.ids.numpy()


def _natural(ids: np.ndarray, settings: _Settings, rng: np.random.Generator) -> list[np.ndarray]:
    present = np.unique(ids)
    if len(present) != settings.clients:
        raise UserError(
            f"the data are of {len(present)} clients, and partition.clients is {settings.clients}: "
            f"set partition.clients = {len(present)} (--clients {len(present)})"
        )
    return [np.flatnonzero(ids == own) for own in present]


def _domains(ids: np.ndarray, settings: _Settings, rng: np.random.Generator) -> list[np.ndarray]:
    present = np.unique(ids)
    each, rest = divmod(settings.clients, len(present))
    if rest or not each:
        below, above = each * len(present), (each + 1) * len(present)
        choice = f"{below} or {above}" if below else f"{above}"
        raise UserError(
            f"the data are of {len(present)} domains, and {settings.clients} clients are not "
            f"equally many of each: set partition.clients = {choice}"
        )
    parts: list[np.ndarray] = [np.empty(0, np.int64)] * settings.clients
    for place, domain in enumerate(present):
        members = rng.permutation(np.flatnonzero(ids == domain))
        for turn, piece in enumerate(np.array_split(members, each)):
            parts[place + turn * len(present)] = piece
    return parts


def _check_sizes(scheme: str, parts: Sequence[np.ndarray], minimum: int) -> None:
    small = [client for client, part in enumerate(parts) if len(part) < minimum]
    if small:
        fewest = _smallest(parts)
        raise UserError(
            f"{len(small)} of {len(parts)} clients have fewer than partition.minimum = {minimum} "
            f"examples (client {small[0]}: {len(parts[small[0]])}), and partition.scheme "
            f"'{scheme}' gives none of another's away: set partition.minimum = {max(fewest, 1)}"
            + ("" if fewest else " and use more examples")
        )


def _repaired(parts: list[np.ndarray], minimum: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Return `parts` with at least `minimum` examples each; the total must suffice."""
    if _smallest(parts) >= minimum:
        return parts
    # The last example of a shuffled list is a random one.
    stacks = [list(rng.permutation(part)) for part in parts]
    sizes = np.array([len(stack) for stack in stacks])
    for client in np.flatnonzero(sizes < minimum):
        while sizes[client] < minimum:
            donor = int(sizes.argmax())
            stacks[client].append(stacks[donor].pop())
            sizes[client] += 1
            sizes[donor] -= 1
    return [np.array(stack, dtype=np.int64) for stack in stacks]


def _smallest(parts: Sequence[np.ndarray]) -> int:
    return min(len(part) for part in parts)


_SCHEMES: Mapping[str, _Scheme] = {
    "iid": _iid,
    "dirichlet": _dirichlet,
    "shards": _shards,
    "quantity": _quantity,
    "labels": _labels,
    "natural": _natural,
    "domains": _domains,
}
SCHEMES: tuple[str, ...] = tuple(_SCHEMES)
_BY_CLASS = frozenset({"dirichlet", "shards", "labels"})
_BY_ORIGIN = frozenset({"natural", "domains"})
_AS_THEY_ARE = frozenset({"labels", "natural", "domains"})
"""Schemes whose parts cannot be repaired without being others."""
