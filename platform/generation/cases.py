"""Cases to generate: held-out samples of a raw corpus, or those of a file in the release's format."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from domainshuttle.model.cases import GenerationCase
from domainshuttle.model.domains import DOMAINS
from domainshuttle.model.generation import DomainShuttlePipeline
from domainshuttle.pipelines.buckets import parse_bucket
from domainshuttle.pipelines.errors import DataError, counted
from domainshuttle.pipelines.index.table import Index
from domainshuttle.pipelines.media.decode import Pixels, decode_image
from domainshuttle.pipelines.sample import RawSample
from domainshuttle.pipelines.shards.tar import read_members
from domainshuttle.platform.config.loading import read_text
from domainshuttle.platform.config.schema import ConfigError


class NotFiniteError(DataError):
    """A clip with values that are no numbers, which would be shown as black."""


def as_pixels(frames: np.ndarray) -> Pixels:
    """[F,h,w,3] floats in 0..1 to uint8. Raises NotFiniteError for a clip whose values are not all finite."""
    if not np.isfinite(frames).all():
        raise NotFiniteError(
            "the clip came out with values that are not finite: the weights are damaged, or of a training that "
            "diverged. Export the model again, of an earlier checkpoint (domainshuttle export RUN FOLDER --checkpoint "
            "NAME)"
        )
    return (np.clip(frames, 0, 1) * 255).round().astype(np.uint8)


@dataclass(frozen=True)
class Case:
    """What is generated, and what it is compared with: pictures [h,w,3] and clips [F,h,w,3], uint8."""

    key: str
    caption: str
    references: tuple[Pixels, ...]
    subjects: tuple[int, ...]
    """Subject on each reference."""
    domains: tuple[int, ...]
    """Domain id wanted for each reference, -1 for none."""
    target: Pixels | None = None
    """The real clip, where there is one."""
    words: tuple[str, ...] = ()
    """What each reference shows, as a detector is asked for it; none: nobody said."""
    split: str = ""
    """That of an evaluation (in_domain, ...); empty where nobody said."""

    @property
    def domain(self) -> str:
        """The domains by name."""
        names = [DOMAINS[domain] if domain >= 0 else "none" for domain in self.domains]
        return ", ".join(dict.fromkeys(names)) or "none"


def load_cases(index: Index, count: int, spread: bool = False) -> list[Case]:
    """`count` single-subject samples of a raw corpus, with one cut-out reference each.

    They are the first ones or, with `spread`, evenly spread over the corpus. Raises DataError when there are too few.
    """
    from domainshuttle.pipelines.encoding.sample_encoder import decode_sample

    single = index.filter("subject_count == 1")
    if len(single) < count:
        raise DataError(
            f"the held-out corpus has {counted(len(single), 'sample')} with one subject, and {count} are asked for"
        )
    chosen = np.linspace(0, len(single) - 1, count).round().astype(int) if spread else np.arange(count)
    cases = []
    for row in single.rows(chosen):
        sample = RawSample.from_members(row.key, read_members(row.folder, row.shard, row.members))
        target, references = decode_sample(sample, parse_bucket(row.bucket))
        one = next((n for n, origin in enumerate(row.reference_origins) if origin == "other_clip"), 0)
        word = sample.info.subjects[sample.info.references[one].subject].word
        cases.append(Case(row.key, sample.info.caption, (references[one],), (0,), (row.domains[0],), target, (word,)))
    return cases


@dataclass(frozen=True)
class FiledCase:
    """A case of a file."""

    name: str
    """Of the files that are made of it: the file's, with the line's number."""
    id: str
    """What stays the same when lines are added, removed or moved: what the line says is its `id`, else a digest."""
    case: GenerationCase
    item: dict[str, Any]
    """The line, parsed."""


def read_cases(path: Path) -> Iterator[FiledCase]:
    """The case of each line of a JSONL file; raises ConfigError that names the line that is not understood."""
    if not path.is_file():
        raise ConfigError(f"no file {path}: expected a JSONL of cases, one a line")
    for number, line in enumerate(read_text(path).split("\n"), 1):  # a prompt may have other ends of lines in it
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            case = GenerationCase.from_release(item, path.parent)
            json.dumps(item, ensure_ascii=False).encode()  # half a character (a lone surrogate) can't be written
            name = item.get("id")
            name = content_id(case) if name in (None, "") else str(name)  # 0 is a name
            yield FiledCase(f"{path.stem}-{number:04d}", name, case, item)
        except (ValueError, TypeError, AttributeError) as error:  # of a line that is no mapping, or of other types
            raise ConfigError(f"{path}, line {number}: {error}") from error


def content_id(case: GenerationCase) -> str:
    """A name of a case that has none, from all that decides what is generated of it: 12 hex digits."""
    digest = hashlib.sha256(json.dumps([case.prompt, case.subjects, case.domains]).encode())
    for picture in case.references:
        digest.update(hashlib.sha256(picture.read_bytes()).digest())
    return digest.hexdigest()[:12]


def case_seed(seed: int, case_id: str, repeat: int = 0) -> int:
    """The seed of a case's noise, 0 to 2^63 - 1: a function of the run's seed, the case's id and the number of the
    repeat alone, so that it stays when cases are added, removed or moved."""
    digest = hashlib.sha256(json.dumps([seed, case_id, repeat]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def cases_of_file(path: Path) -> list[Case]:
    """The cases of a JSONL file with their pictures; raises ConfigError, or DataError for a picture that is none."""
    cases = []
    for filed in read_cases(path):
        case, item = filed.case, filed.item
        pictures = tuple(decode_image(picture.read_bytes(), str(picture)) for picture in case.references)
        words, split = tuple(item.get("labels") or ()), str(item.get("split") or "")
        cases.append(Case(filed.id, case.prompt, pictures, case.subjects, case.domains, None, words, split))
    if not cases:
        raise ConfigError(f"{path} has no cases: expected one a line")
    return cases


def generate_cases(
    pipeline: DomainShuttlePipeline,
    cases: list[Case],
    size: tuple[int, int, int],
    steps: int,
    guidance: float,
    seed: int,
    on_step: Callable[[int], None] = lambda _: None,
) -> list[Pixels]:
    """A clip [F,h,w,3] a case, all in one batch; `size` is frames, height, width, and each has a seed of its own.

    `on_step` is called with the number of sampling steps done; what it raises ends the generation. Raises
    NotFiniteError for a clip whose values are not all finite.
    """
    frames, height, width = size

    def callback(_: object, step: int, __: float, tensors: dict[str, object]) -> dict[str, object]:
        on_step(step + 1)
        return tensors

    with_references = any(case.references for case in cases)
    result: Any = pipeline(
        prompt=[case.caption for case in cases],
        negative_prompt="",
        references=[[Image.fromarray(p) for p in case.references] for case in cases] if with_references else None,
        reference_subjects=[list(case.subjects) for case in cases] if with_references else None,
        reference_domains=[list(case.domains) for case in cases] if with_references else None,
        height=height,
        width=width,
        num_frames=frames,
        num_inference_steps=steps,
        guidance_scale=guidance,
        reference_guidance_scale=guidance,
        seed=[case_seed(seed, case.key) for case in cases],
        output_type="np",
        callback_on_step_end=callback,
    )
    return [as_pixels(clip) for clip in result.frames]
