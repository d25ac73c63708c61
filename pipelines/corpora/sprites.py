"""Sprites: the synthetic corpus, built without any download.

Subjects with an identity (form, colours, marking) are drawn in several views, sizes, lightings and domains, as
pictures and as short clips with motion. It has every case that the recipe's data have: one and several subjects,
references from the same clip, from other scenes and of another domain than the target (cross-domain pairs), and
backgrounds as subjects. Sample `i` of a corpus is a pure function of (seed, i).
"""

from collections.abc import Iterator
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from domainshuttle.model.domains import DOMAINS
from domainshuttle.pipelines.buckets import Bucket, choose_bucket, frames_at
from domainshuttle.pipelines.corpora.drawing import MOST_IDENTITIES, SCENES, Identity, Pose, draw_scene, identities
from domainshuttle.pipelines.corpora.source import LeftOut, Notes, Piece, Record, RecordSource, Tables
from domainshuttle.pipelines.media.decode import Pixels, encode_jpeg, encode_mp4
from domainshuttle.pipelines.sample import RawSample, Reference, SampleInfo, Subject
from domainshuttle.pipelines.values import MOST_COUNT, Fps, Section, Share, Whole

MOTIONS: dict[str, tuple[float, float, float]] = {
    # whole displacement over a clip in picture sides, and turn in radians
    "moving right": (0.24, 0.0, 0.0),
    "moving left": (-0.24, 0.0, 0.0),
    "rising": (0.0, -0.2, 0.0),
    "falling": (0.0, 0.2, 0.0),
    "turning": (0.0, 0.0, 0.8),
    "standing still": (0.0, 0.0, 0.0),
}


class SpritesConfig(Section):
    """What a corpus of sprites holds."""

    builder: Literal["sprites"] = "sprites"
    kind: Literal["image", "video"] = "image"
    samples: Whole = Field(ge=1, le=1 << 32)
    identities: Whole = Field(
        default=480, ge=1, le=MOST_IDENTITIES, description="identities drawn in all, training and held out"
    )
    held_out: Whole = Field(
        default=32, ge=0, le=MOST_IDENTITIES, description="the last identities, never shown in training"
    )
    split: Literal["train", "held_out"] = "train"
    seed: Whole = Field(default=0, ge=0, le=MOST_COUNT)
    side: Whole = Field(default=96, ge=32, le=4096, description="height and width of pictures in pixels")
    frames: Whole = Field(default=9, ge=1, le=10_000, description="frames of a clip (pictures have one)")
    fps: Fps = 8.0
    references_per_subject: Whole = Field(default=3, ge=1, le=5)
    two_subjects: Share = Field(default=0.25, description="share of samples with two subjects")
    cross_domain: Share = Field(default=0.3, description="share of subjects shown in another domain")

    @model_validator(mode="after")
    def _some_to_draw(self) -> Self:
        drawn = self.identities - self.held_out if self.split == "train" else min(self.held_out, self.identities)
        least = 2 if self.two_subjects else 1
        if drawn < least:
            raise ValueError(
                f"identities={self.identities} with held_out={self.held_out} leave {max(drawn, 0)} for split="
                f"{self.split}, and with two_subjects={self.two_subjects:g} it needs {least}: raise one of them"
            )
        return self

    def check_buckets(self, buckets: list[Bucket], fps: float | None) -> None:
        """Raises DataError where its samples fit none of the buckets."""
        frames, rate = (self.frames, self.fps) if self.kind == "video" else (1, None)
        choose_bucket(frames_at(frames, rate, fps), self.side, self.side, buckets)


class SpritesBuilder(RecordSource):
    """Draws a corpus of sprites: the source (`source.Source`) that needs no files."""

    def __init__(self, config: SpritesConfig, source: str) -> None:
        self.config = config
        self.source = source
        every = identities(config.identities, config.seed)
        cut = config.identities - config.held_out
        self.identities = every[:cut] if config.split == "train" else every[cut:]

    def pieces(self) -> list[Piece]:
        return [Piece("numbers", str(self.config.samples))]

    def survey(self, piece: Piece) -> Iterator[Record | LeftOut]:
        for number in range(self.config.samples):
            yield Record(self._key(number), {"number": number})

    def raw_sample(self, record: Record, tables: Tables, notes: Notes) -> RawSample:
        return self.sample(int(record.payload["number"]))

    def _key(self, number: int) -> str:
        return f"{self.config.split}-{number:07d}"

    def build(self, start: int, stop: int) -> Iterator[RawSample]:
        """Samples start..stop-1, in order."""
        for number in range(start, stop):
            yield self.sample(number)

    def sample(self, number: int) -> RawSample:
        """Sample `number`: target, references, caption."""
        config = self.config
        rng = np.random.Generator(np.random.Philox(key=(config.seed << 32) + number, counter=config.kind == "video"))
        # every identity appears equally often; the second subject is drawn at random
        who = self.identities[number % len(self.identities)]
        cast = [who]
        if rng.random() < config.two_subjects:
            cast.append(self._partner(who, rng))
        # a background lies behind the others, so it is drawn and listed first
        cast.sort(key=lambda one: one.native != "background")
        domains = [self._domain(one, rng) for one in cast]
        scene = str(rng.choice(list(SCENES)))
        motion = str(rng.choice(list(MOTIONS))) if config.kind == "video" else "standing still"
        clip = self._clip(cast, domains, scene, motion, rng)
        target = {"mp4": encode_mp4(clip, config.fps)} if config.kind == "video" else {"jpg": encode_jpeg(clip[0])}

        references: list[Reference] = []
        files: dict[str, bytes] = dict(target)
        for index, one in enumerate(cast):
            for turn in range(config.references_per_subject):
                origin, picture = self._reference(one, domains[index], turn, rng)
                name = f"ref{len(references)}.jpg"
                references.append(Reference(file=name, subject=index, origin=origin, size=(config.side, config.side)))
                files[name] = encode_jpeg(picture)
        info = SampleInfo(
            caption=caption(cast, domains, scene, motion if config.kind == "video" else None),
            source=self.source,
            kind=config.kind,
            fps=config.fps if config.kind == "video" else None,
            frames=len(clip),
            size=(config.side, config.side),
            subjects=[
                Subject(id=index, word=one.word, domain=DOMAINS.index(domain))
                for index, (one, domain) in enumerate(zip(cast, domains, strict=True))
            ],
            references=references,
            scores={"identity": float(who.number)},
        )
        return RawSample(key=self._key(number), info=info, files=files)

    def _partner(self, who: Identity, rng: np.random.Generator) -> Identity:
        while True:
            other = self.identities[int(rng.integers(len(self.identities)))]
            if other is not who and not (who.native == other.native == "background"):
                return other

    def _domain(self, who: Identity, rng: np.random.Generator) -> str:
        """The domain a subject has in the target: its own, or for a cross-domain sample fantasy."""
        crosses = who.native != "background" and rng.random() < self.config.cross_domain
        return "fantasy" if crosses else who.native

    def _clip(
        self, cast: list[Identity], domains: list[str], scene: str, motion: str, rng: np.random.Generator
    ) -> Pixels:
        config = self.config
        frames = config.frames if config.kind == "video" else 1
        front = [one for one in cast if one.native != "background"]
        light, shift = rng.uniform(0.88, 1.08), rng.uniform(-0.08, 0.08)
        starts: dict[int, Pose] = {}
        for place, one in enumerate(front):
            x = 0.5 if len(front) == 1 else (0.29, 0.71)[place]
            starts[one.number] = Pose(
                x=x + rng.uniform(-0.04, 0.04),
                y=0.53 + rng.uniform(-0.04, 0.04),
                scale=rng.uniform(0.31, 0.35) if len(front) == 1 else rng.uniform(0.22, 0.25),
                angle=rng.uniform(-0.1, 0.1),
                light=light,
            )
        dx, dy, turn = MOTIONS[motion]
        pictures = []
        for frame in range(frames):
            along = frame / max(frames - 1, 1) - 0.5 if frames > 1 else 0.0
            drawn = [
                (one, domain, starts[one.number].moved(dx * along, dy * along, turn * along)
                 if one.number in starts else Pose(x=shift, light=light))
                for one, domain in zip(cast, domains, strict=True)
            ]  # fmt: skip
            pictures.append(np.asarray(draw_scene(scene, drawn, config.side, shift)))
        return np.stack(pictures)

    def _reference(
        self, who: Identity, target_domain: str, turn: int, rng: np.random.Generator
    ) -> tuple[Literal["same_clip", "other_clip", "edited", "photo"], Pixels]:
        """One picture of a subject: in turn a cut-out in the target's look, another scene, another photo.

        References show the native domain unless they come from the target's own clip, so that a fantasy target
        has references of the other domain (cross-domain pairs).
        """
        pose = Pose(
            x=0.5 + rng.uniform(-0.05, 0.05),
            y=0.52 + rng.uniform(-0.05, 0.05),
            scale=rng.uniform(0.33, 0.4),
            angle=rng.uniform(-0.15, 0.15),
            light=rng.uniform(0.85, 1.1),
        )
        crossed = target_domain != who.native
        origin = ("edited" if crossed else "same_clip", "other_clip", "photo")[turn % 3]
        # subjects are cut out on white, as a segmenter would; every third picture keeps its scene
        scene = str(rng.choice(list(SCENES))) if origin == "photo" else None
        return origin, np.asarray(draw_scene(scene, [(who, who.native, pose)], self.config.side))  # type: ignore[return-value]


def caption(cast: list[Identity], domains: list[str], scene: str, motion: str | None) -> str:
    """What a captioner would say; it names classes, scene, motion and style, never colours."""
    front = [one for one in cast if one.native != "background"]
    words = " and ".join(f"a {one.word}" for one in front) or "a landscape"
    moving = f" {motion}" if motion and front else ""
    hills = " before hills" if len(front) < len(cast) and front else ""
    style = ", fantasy" if "fantasy" in domains else ""
    return f"{words}{moving} in a {scene}{hills}{style}"
