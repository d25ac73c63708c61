"""The domains that a subject can be wanted in; known without torch, since the data's rooms name them too."""

DOMAINS = ("human", "object", "fantasy", "background", "other")
"""Domain attribute wanted for a subject in the generated video; the position is the id, -1 means none."""
_ALIASES = {"man": "human", "woman": "human", "others": "other"}


def domain_id(domain: int | str | None, num_domains: int = len(DOMAINS)) -> int:
    """Id of a domain given as an id, a name ("Human", "fantasy", the release's "Fantasy Domain") or None (-1).

    Raises:
        ValueError: for an unknown domain.
    """
    if isinstance(domain, str):
        name = domain.strip().lower().removesuffix("domain").strip()
        name = _ALIASES.get(name, name)
        found = DOMAINS.index(name) if name in DOMAINS else len(DOMAINS)
    elif domain is None:
        found = -1
    else:  # a file may have said true, or 1.5
        found = int(domain) if int(domain) == domain and not isinstance(domain, bool) else len(DOMAINS)
    if not -1 <= found < num_domains:
        known = ", ".join(f"{name} ({i})" for i, name in enumerate(DOMAINS[:num_domains]))
        raise ValueError(f"unknown domain {domain!r}; expected one of {known}, or None (-1) for no domain")
    return found
