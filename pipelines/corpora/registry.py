"""The sources by name: what `build.builder` of a corpus may be, with the configuration of each."""

from typing import Annotated, Any

from pydantic import Discriminator, Tag

from domainshuttle.pipelines.corpora.opens2v import OpenS2VConfig, OpenS2VSource
from domainshuttle.pipelines.corpora.source import Source
from domainshuttle.pipelines.corpora.sprites import SpritesBuilder, SpritesConfig
from domainshuttle.pipelines.corpora.uno import UnoConfig, UnoSource

_DEFAULT = "sprites"


def _tag(value: Any) -> str:
    """Which configuration a mapping, or a section that was made of it, is. In brackets, as tags are not shown."""
    name = value.get("builder", _DEFAULT) if isinstance(value, dict) else getattr(value, "builder", _DEFAULT)
    return f"<{name}>"


CorpusConfig = Annotated[
    Annotated[SpritesConfig, Tag("<sprites>")]
    | Annotated[UnoConfig, Tag("<uno>")]
    | Annotated[OpenS2VConfig, Tag("<opens2v>")],
    Discriminator(_tag),
]
_SOURCES: dict[type, Any] = {SpritesConfig: SpritesBuilder, UnoConfig: UnoSource, OpenS2VConfig: OpenS2VSource}


def make_source(config: Any, corpus: str) -> Source:
    """The source that a corpus's configuration asks for; its samples name `corpus` as their source."""
    source: Source = _SOURCES[type(config)](config, corpus)
    return source
