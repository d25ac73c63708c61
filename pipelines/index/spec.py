"""What a corpus is to a run: its name, where it lies, how its samples are fitted, and its share of a batch."""

from dataclasses import dataclass
from typing import Literal

from domainshuttle.pipelines.buckets import Bucket
from domainshuttle.pipelines.index.parts import INDEX_NAME
from domainshuttle.pipelines.storage.uri import join


@dataclass(frozen=True, slots=True)
class CorpusSpec:
    """A corpus in one of its forms, as a configuration describes it."""

    name: str
    form: Literal["raw", "encoded"]
    folder: str
    """Path or URI of the folder of its shards."""
    buckets: tuple[Bucket, ...] = ()
    fps: float | None = None
    """Frames a second at which clips are sampled; None: each clip's own."""

    @property
    def index(self) -> str:
        """Location of its index file."""
        return join(self.folder, INDEX_NAME)

    def share(self, weight: float | None = None, where: str | None = None) -> "CorpusShare":
        """Its part in a mixture."""
        return CorpusShare(self.name, self.index, weight, where)


@dataclass(frozen=True, slots=True)
class CorpusShare:
    """A corpus in a mixture: which of its samples are trained on, and how often."""

    corpus: str
    """Its name, as its index has it."""
    index: str
    """Location of its index file."""
    weight: float | None = None
    """Its share of the samples, on any scale; None, of all corpora: by the numbers of their samples."""
    where: str | None = None
    """The filter (`RowFilter`) of its samples: the others do not exist here; None: all."""
