"""The domains that a subject can be wanted in; known without torch, since the data's rooms name them too."""

from typing import Any

DOMAINS = ("human", "object", "fantasy", "background", "other")
"""Domain attribute wanted for a subject in the generated video; the position is the id, -1 means none."""
_ALIASES = {"man": "human", "woman": "human", "others": "other"}


def domain_id(domain: int | str | None, num_domains: int = len(DOMAINS)) -> int:
    """Id of a domain given as an id, a name ("Human", "fantasy", the release's "Fantasy Domain") or None (-1).

    Raises:
        ValueError: for an unknown domain.
    """
    found = -1 if domain is None else _named(domain) if isinstance(domain, str) else _whole(domain)
    if found is None or not -1 <= found < num_domains:
        known = ", ".join(f"{name} ({i})" for i, name in enumerate(DOMAINS[:num_domains]))
        raise ValueError(f"unknown domain {domain!r}; expected one of {known}, or None (-1) for no domain")
    return found


def _named(domain: str) -> int | None:
    name = domain.strip().lower().removesuffix("domain").strip()
    name = _ALIASES.get(name, name)
    return DOMAINS.index(name) if name in DOMAINS else None


def _whole(value: Any) -> int | None:
    """The number of a value out of a file; None for what is none, such as true, 1.5 or a list."""
    try:
        return int(value) if not isinstance(value, bool) and int(value) == value else None
    except (TypeError, ValueError, OverflowError):
        return None
