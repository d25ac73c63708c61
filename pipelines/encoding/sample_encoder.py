"""Raw samples to latents and text states, one sample at a time: the same bits beforehand and while training."""

import hashlib
import json
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from domainshuttle.model.encoder_sources import BYTE_UMT5
from domainshuttle.model.encoders import TextEncoder, VideoEncoder, load_text_encoder, load_video_encoder
from domainshuttle.pipelines.buckets import Bucket, parse_bucket
from domainshuttle.pipelines.encoding.throughput import DECODE, READ, TEXT, VIDEO
from domainshuttle.pipelines.encoding.units import Before
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.index.samples import read_verified_sample
from domainshuttle.pipelines.index.table import IndexRow
from domainshuttle.pipelines.media.augment import AugmentedView, apply_view, augmented_view
from domainshuttle.pipelines.media.claims import reference_pixels, target_pixels
from domainshuttle.pipelines.media.conversions import noted_conversions
from domainshuttle.pipelines.media.decode import Pixels, fit_reference
from domainshuttle.pipelines.plan.feed import EncoderSources
from domainshuttle.pipelines.plan.pairing import single_pictures
from domainshuttle.pipelines.quarantine import of_sample
from domainshuttle.pipelines.sample import LABELS_MEMBER, RawSample
from domainshuttle.pipelines.shards.tensors import EncodedSample


def load_encoders(sources: EncoderSources, device: str = "cpu") -> tuple[VideoEncoder, TextEncoder]:
    """Both encoders, on a device. On each device Wan's VAE computes in float32 and a UMT5 in bf16, as in Wan's own
    pipeline; the built-in text encoder in float32, since CPUs may multiply bf16 far slower."""
    dtype = torch.float32 if sources.text == BYTE_UMT5 else torch.bfloat16
    text = load_text_encoder(sources.text, sources.text_len, device, dtype)
    return load_video_encoder(sources.video, device, tile_above=sources.tile_above), text


class SampleEncoder:
    """Both encoders, for one clip, picture or caption at a time.

    So what comes out depends on nothing that is encoded beside it: a corpus encoded beforehand and one encoded while it
    is trained on give the same bits, and one clip at a time is what a GPU's memory holds at full size anyway.
    """

    def __init__(self, video: VideoEncoder, text: TextEncoder) -> None:
        self._video, self._text = video, text
        self.caption = lru_cache(_CAPTIONS_KEPT)(self._caption)

    @torch.no_grad()
    def target(self, frames: Pixels) -> Tensor:
        """[F,H,W,3] uint8 to bf16 latents [16,f,h,w] on the CPU."""
        return self._video.encode(to_pixels(frames))[0].to("cpu", torch.bfloat16).contiguous()

    def picture(self, picture: Pixels) -> Tensor:
        """[H,W,3] uint8 to bf16 latents [16,h,w] on the CPU."""
        return self.target(picture[None])[:, 0]

    def caption_tokens(self, caption: str) -> int:
        """Tokens of a whole caption: more than it has states where it is cut to the encoder's length."""
        return self._text.count_tokens(caption)

    def _caption(self, caption: str) -> Tensor:
        """bf16 states [l,d] on the CPU; the last captions' are kept, as they come again in each epoch."""
        return self._text.encode([caption])[0].to("cpu", torch.bfloat16).contiguous()


_CAPTIONS_KEPT = 256


@dataclass
class Tally:
    """What encoding some samples took: `seconds` by stage, and of how many samples the latents were encoded
    (`encoded`), all was encoded before (`copied`), or the latents were and the caption was not (`captions`)."""

    seconds: Counter[str] = field(default_factory=Counter)
    encoded: int = 0
    captions: int = 0
    copied: int = 0


@dataclass(frozen=True)
class _Prepared:
    """A raw sample whose latents are to be encoded, in pixels fitted to its bucket: target [F,H,W,3], references and
    views [H,W,3]; or, as `known`, the sample of before whose latents are still right. `whole`: its caption is too."""

    sample: RawSample | None
    pixels: bytes
    seconds: Counter[str]
    target: Pixels | None = None
    references: tuple[Pixels, ...] = ()
    views: Mapping[int, Pixels] = field(default_factory=dict)
    converted: tuple[str, ...] = ()
    known: EncodedSample | None = None
    whole: bool = False


def encode_rows(
    rows: list[IndexRow],
    video: VideoEncoder,
    text: TextEncoder,
    fps: float | None = None,
    before: Mapping[int, Before] | None = None,
    tally: Tally | None = None,
    threads: int = 1,
) -> Iterator[tuple[IndexRow, EncodedSample | DataError]]:
    """Encodes raw samples, clips sampled at `fps`: each row comes back with its encoded sample, or with the reason why
    there is none. While one is encoded, `threads` read and decode the next: no more than one more than they are is
    held in pixels. What is right of the samples of `before`, by their ids, is taken from there."""
    encoder, tally, before = SampleEncoder(video, text), tally or Tally(), before or {}
    waiting: deque[tuple[IndexRow, Future[_Prepared]]] = deque()
    with ThreadPoolExecutor(threads, "decode") as pool:
        try:
            for row in rows:
                waiting.append((row, pool.submit(_prepare_row, row, fps, before.get(row.sample_id))))
                if len(waiting) > threads:
                    yield _finished(encoder, tally, *waiting.popleft())
            while waiting:
                yield _finished(encoder, tally, *waiting.popleft())
        finally:
            for _, left in waiting:
                left.cancel()


@contextmanager
def timed(seconds: Counter[str], stage: str) -> Iterator[None]:
    """Adds the seconds of the block to a stage."""
    began = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] += time.perf_counter() - began  # type: ignore[assignment]


def _prepare_row(row: IndexRow, fps: float | None, before: Before | None) -> _Prepared:
    seconds: Counter[str] = Counter()
    known = None
    with timed(seconds, READ):
        if before is not None:
            known = before.read()
        if before is not None and known is not None and before.whole(row.checksum):
            return _Prepared(None, known.pixels, seconds, known=known, whole=True)
    with of_sample(f"{row.source}/{row.key}"), noted_conversions() as converted:
        with timed(seconds, READ):
            sample, digests = read_verified_sample(row)
            pixels = _pixels_digest(row, sample, digests)
        if before is not None and known is not None and before.same_pixels(row.checksum, pixels):
            same = before.same_text and known.info.caption == sample.info.caption
            kept = replace(known, info=sample.info, pixels=pixels)
            return _Prepared(sample, pixels, seconds, known=kept, whole=same)
        with timed(seconds, DECODE):
            bucket = parse_bucket(row.bucket)
            target, pictures = decode_sample(sample, bucket, fps)
            # one view for the whole corpus: the pixels are gone when it is trained on
            views = {
                number: decode_reference(sample, number, bucket, augmented_view(0, 0, row.sample_id, number))
                for number in single_pictures([reference.subject for reference in sample.info.references])
            }
        return _Prepared(sample, pixels, seconds, target, tuple(pictures), views, tuple(sorted(converted)))


def _pixels_digest(row: IndexRow, sample: RawSample, digests: Mapping[str, bytes]) -> bytes:
    """Of all of a raw sample that decides its latents, or that it has none: its files, and what is claimed of them."""
    info = sample.info
    references = [(one.file, one.subject, one.size) for one in info.references]
    claims = [row.sample_id, info.kind, info.fps, info.frames, info.size, references]
    digest = hashlib.blake2b(json.dumps(claims).encode(), digest_size=16)
    for name in sorted(set(digests) - {"json", LABELS_MEMBER}):
        digest.update(digests[name])
    return digest.digest()


def _finished(
    encoder: SampleEncoder, tally: Tally, row: IndexRow, preparing: Future[_Prepared]
) -> tuple[IndexRow, EncodedSample | DataError]:
    try:
        prepared = preparing.result()
        tally.seconds.update(prepared.seconds)
        if prepared.known is not None and prepared.whole:
            tally.copied += 1
            return row, prepared.known
        assert prepared.sample is not None
        info = prepared.sample.info
        with of_sample(f"{row.source}/{row.key}"):
            with timed(tally.seconds, TEXT):
                states = _bits(encoder.caption(info.caption))
                tokens = encoder.caption_tokens(info.caption)
            if prepared.known is not None:
                tally.captions += 1
                return row, replace(prepared.known, text=states, caption_tokens=tokens)
            assert prepared.target is not None
            with timed(tally.seconds, VIDEO):
                made = EncodedSample(
                    key=prepared.sample.key,
                    info=info,
                    target=_bits(encoder.target(prepared.target)),
                    references=[_bits(encoder.picture(picture)) for picture in prepared.references],
                    text=states,
                    caption_tokens=tokens,
                    views={number: _bits(encoder.picture(picture)) for number, picture in prepared.views.items()},
                    converted=prepared.converted,
                    pixels=prepared.pixels,
                )
            tally.encoded += 1
            return row, made
    except DataError as error:
        return row, error


def decode_sample(sample: RawSample, bucket: Bucket, fps: float | None = None) -> tuple[Pixels, list[Pixels]]:
    """Target [F,H,W,3], a clip sampled at `fps`, and references [H,W,3], decoded and fitted to the bucket; raises
    DataError."""
    pictures = [decode_reference(sample, number, bucket) for number in range(len(sample.info.references))]
    return decode_target(sample, bucket, fps), pictures


def decode_target(sample: RawSample, bucket: Bucket, fps: float | None = None) -> Pixels:
    """The target [F,H,W,3], a clip sampled at `fps`, decoded and fitted to the bucket; raises DataError, also where it
    is not what key.json claims."""
    return target_pixels(sample, bucket, fps)


def decode_reference(sample: RawSample, number: int, bucket: Bucket, view: AugmentedView | None = None) -> Pixels:
    """Reference `number` [H,W,3], altered where a view is given, decoded and fitted to the bucket; raises DataError,
    also where it is not what key.json claims."""
    picture = reference_pixels(sample, number)
    return fit_reference(picture if view is None else apply_view(picture, view), bucket)


def to_pixels(frames: Pixels) -> Tensor:
    """[F,H,W,3] uint8 to [1,3,F,H,W] float32 in -1..1."""
    return torch.from_numpy(np.array(frames)).permute(3, 0, 1, 2).unsqueeze(0).float().div_(127.5).sub_(1)


def _bits(tensor: Tensor) -> np.ndarray:
    """A bf16 tensor as its bit patterns."""
    bits: np.ndarray = tensor.contiguous().view(torch.uint16).numpy()
    return bits
