"""The domain of a subject by its words: the fallback where no model labelled it.

A sample whose domains come from here has the score `domains_from_words` = 1, so that it can be found and labelled.
"""

import hashlib
import re

from domainshuttle.model.domains import DOMAINS

FROM_WORDS = "domains_from_words"
CAPTION_IS_INSTRUCTION = "caption_is_instruction"
"""The score of a sample whose caption is an edit command that nobody has rewritten."""
HUMAN, OBJECT, FANTASY, BACKGROUND = (DOMAINS.index(name) for name in ("human", "object", "fantasy", "background"))


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_PEOPLE = _words(
    """person people human man men woman women boy boys girl girls child children kid kids baby babies toddler infant
    teenager adult lady ladies gentleman gentlemen guy guys individual individuals couple crowd family mother father
    mom dad son daughter brother sister grandmother grandfather bride groom chef cook doctor nurse dancer singer actor
    actress athlete player runner swimmer cyclist skier surfer hiker worker farmer soldier officer policeman policewoman
    firefighter teacher student musician guitarist pianist drummer artist painter photographer driver pilot model
    businessman businesswoman astronaut fisherman waiter waitress barista face head portrait queen king prince princess
    monk priest nun"""
)
_FANTASY = _words(
    """dragon unicorn fairy elf dwarf goblin orc troll wizard witch mermaid centaur phoenix griffin demon angel monster
    alien robot android cyborg zombie vampire werewolf ghost superhero cartoon anime pixar chibi mascot creature pokemon
    yeti gnome giant genie"""
)
_BACKGROUNDS = _words(
    """background sky beach sea ocean lake river mountain mountains forest woods field meadow grassland lawn desert
    street road highway city cityscape skyline park garden room kitchen bedroom bathroom office classroom hallway stage
    studio landscape scene scenery snow sunset sunrise waterfall valley hill hills countryside village"""
)
_BREAK = re.compile(r"\b(?:with|in|on|of|at|by|from|who|that|which|wearing|holding|sitting|standing|and)\b|[,.;:(]")


WORDS_DIGEST = hashlib.blake2b(
    " ".join(sorted([*_PEOPLE, "|", *_FANTASY, "|", *_BACKGROUNDS])).encode(), digest_size=4
).hexdigest()
"""Of the lists."""
_UNNAMED = re.compile(r"(?:subject(?: \d+)?|scene|)")


def is_unnamed(word: str) -> bool:
    """Whether a word only stands for one: what builders write where a source has no words."""
    return bool(_UNNAMED.fullmatch(word.strip().lower()))


def known_words(text: str) -> list[str]:
    """The people and imaginary beings that a text names, by the lists, each once and in its order."""
    words = re.findall(r"[\w'-]+", text.lower())
    known = _PEOPLE | _FANTASY
    return [*dict.fromkeys(word for word in words if word in known or word.removesuffix("s") in known)]


def head_noun(phrase: str) -> str:
    """The last word of a phrase's first noun group, in small letters: 'man' of 'a man in a red shirt'."""
    words = re.findall(r"[\w'-]+", _BREAK.split(phrase.strip().lower(), maxsplit=1)[0])
    return words[-1] if words else ""


def domain_of(phrase: str, background: bool = False) -> int:
    """The domain that a word or phrase suggests; an object where the lists know nothing."""
    head = head_noun(phrase)
    if background:
        return BACKGROUND
    if head in _PEOPLE or head.removesuffix("s") in _PEOPLE:
        return HUMAN
    if head in _FANTASY or head.removesuffix("s") in _FANTASY:
        return FANTASY
    return BACKGROUND if head in _BACKGROUNDS else OBJECT
