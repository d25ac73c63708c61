"""What training changes of the samples of an index: targets that are enlarged, cropped or shortened for their buckets,
clips whose rate is changed, captions that are cut. Counted from the rows alone."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from domainshuttle.pipelines.buckets import cover_geometry, frames_at, parse_bucket
from domainshuttle.pipelines.errors import DataError

COLUMNS = ("frames", "height", "width", "fps", "bucket", "text_tokens", "caption_tokens")
"""The columns of an index that are counted."""


@dataclass(frozen=True)
class Alterations:
    """How many of `samples` are changed, and how much at most."""

    samples: int = 0
    enlarged: int = 0
    """Targets that are smaller than their buckets."""
    most_enlarged: float = 1.0
    """Times as high and wide."""
    cropped: int = 0
    """Targets of other proportions than their buckets', of which rows or columns are cut off."""
    most_cropped: float = 0.0
    """Share of the area."""
    shortened: int = 0
    """Clips that are longer than their buckets: what comes later is not seen."""
    most_shortened: float = 0.0
    """Share of the frames at the rate at which they are sampled."""
    thinned: int = 0
    """Clips of a higher rate than they are sampled at: frames are left out."""
    repeated: int = 0
    """Clips of a lower rate than they are sampled at: frames come again."""
    cut_captions: int = 0
    """Captions that have more tokens than were encoded; of raw samples nobody has counted."""

    def __add__(self, other: "Alterations") -> "Alterations":
        values = {
            name: max(value, theirs) if name.startswith("most_") else value + theirs
            for (name, value), theirs in zip(vars(self).items(), vars(other).values(), strict=True)
        }
        return Alterations(**values)

    def sentences(self) -> list[str]:
        """What is changed, each as 'N what (how much)'; nothing of what changes no sample."""
        said = {
            f"{self.enlarged} enlarged (up to {self.most_enlarged:.2g} times)": self.enlarged,
            f"{self.cropped} cropped (up to {self.most_cropped:.0%} of the area)": self.cropped,
            f"{self.shortened} shortened (up to {self.most_shortened:.0%} of the frames)": self.shortened,
            f"{self.thinned} with frames left out (their rate is higher)": self.thinned,
            f"{self.repeated} with frames repeated (their rate is lower)": self.repeated,
        }
        return [text for text, count in said.items() if count]


def count_alterations(table: pa.Table, fps: float | None) -> Alterations:
    """Of the rows of one corpus, whose clips are sampled at `fps` (None: each at its own rate). Needs COLUMNS."""
    cut = pc.sum(pc.greater(table.column("caption_tokens"), table.column("text_tokens"))).as_py() or 0
    total = Alterations(samples=len(table), cut_captions=cut)
    shapes = table.select(["frames", "height", "width", "fps", "bucket"])
    shapes = shapes.set_column(4, "bucket", shapes.column("bucket").cast(pa.string()))
    for kind in shapes.group_by(shapes.column_names).aggregate([([], "count_all")]).to_pylist():
        total += _of_shape(**kind, sampled=fps)
    return total


def _of_shape(
    frames: int, height: int, width: int, fps: float | None, bucket: str, count_all: int, sampled: float | None
) -> Alterations:
    """Of `count_all` samples of one shape."""
    wanted = parse_bucket(bucket)
    scaled, (_, _, *kept) = cover_geometry((height, width), wanted)
    enlarged = max(scaled[0] / height, scaled[1] / width)
    lost = 1 - kept[0] * kept[1] / (scaled[0] * scaled[1])
    try:
        there = frames_at(frames, fps, sampled)
    except DataError:  # of an index that was written otherwise; it is refused where it is used
        there = frames
    clip = frames > 1 and fps is not None and sampled is not None
    return Alterations(
        enlarged=count_all * (enlarged > 1),
        most_enlarged=max(enlarged, 1.0),
        cropped=count_all * (lost > 0),
        most_cropped=lost,
        shortened=count_all * (there > wanted.frames),
        most_shortened=max(0.0, 1 - wanted.frames / there),
        thinned=count_all * bool(clip and np.float32(fps) > np.float32(sampled)),
        repeated=count_all * bool(clip and np.float32(fps) < np.float32(sampled)),
    )
