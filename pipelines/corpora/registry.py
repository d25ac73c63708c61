"""The sources by name: what `build.builder` of a corpus may be, with the configuration of each."""

from typing import Annotated, Any

from pydantic import Discriminator, Tag

from domainshuttle.pipelines.corpora.ditto import DittoConfig, DittoSource
from domainshuttle.pipelines.corpora.echo_4o import Echo4oConfig, Echo4oSource
from domainshuttle.pipelines.corpora.manifest import ManifestConfig, ManifestSource
from domainshuttle.pipelines.corpora.musar_gen import MusarGenConfig, MusarGenSource
from domainshuttle.pipelines.corpora.nano_consistent import NanoConsistentConfig, NanoConsistentSource
from domainshuttle.pipelines.corpora.opens2v import OpenS2VConfig, OpenS2VSource
from domainshuttle.pipelines.corpora.phantom_data import PhantomDataConfig, PhantomDataSource
from domainshuttle.pipelines.corpora.source import Source
from domainshuttle.pipelines.corpora.sprites import SpritesBuilder, SpritesConfig
from domainshuttle.pipelines.corpora.uno import UnoConfig, UnoSource
from domainshuttle.pipelines.corpora.webdataset_shards import WebDatasetConfig, WebDatasetSource

_DEFAULT = "sprites"


def _tag(value: Any) -> str:
    """Which configuration a mapping, or a section that was made of it, is. In brackets, as tags are not shown."""
    name = value.get("builder", _DEFAULT) if isinstance(value, dict) else getattr(value, "builder", _DEFAULT)
    return f"<{name}>"


CorpusConfig = Annotated[
    Annotated[SpritesConfig, Tag("<sprites>")]
    | Annotated[UnoConfig, Tag("<uno>")]
    | Annotated[NanoConsistentConfig, Tag("<nano-consistent>")]
    | Annotated[Echo4oConfig, Tag("<echo-4o>")]
    | Annotated[MusarGenConfig, Tag("<musar-gen>")]
    | Annotated[PhantomDataConfig, Tag("<phantom-data>")]
    | Annotated[OpenS2VConfig, Tag("<opens2v>")]
    | Annotated[DittoConfig, Tag("<ditto>")]
    | Annotated[ManifestConfig, Tag("<manifest>")]
    | Annotated[WebDatasetConfig, Tag("<webdataset>")],
    Discriminator(_tag),
]
_SOURCES: dict[type, Any] = {
    SpritesConfig: SpritesBuilder,
    UnoConfig: UnoSource,
    NanoConsistentConfig: NanoConsistentSource,
    Echo4oConfig: Echo4oSource,
    MusarGenConfig: MusarGenSource,
    PhantomDataConfig: PhantomDataSource,
    OpenS2VConfig: OpenS2VSource,
    DittoConfig: DittoSource,
    ManifestConfig: ManifestSource,
    WebDatasetConfig: WebDatasetSource,
}


def make_source(config: Any, corpus: str) -> Source:
    """The source that a corpus's configuration asks for; its samples name `corpus` as their source."""
    source: Source = _SOURCES[type(config)](config, corpus)
    return source
