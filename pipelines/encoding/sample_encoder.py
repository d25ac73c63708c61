"""Raw samples to latents and text states, one sample at a time: the same bits beforehand and while training."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from domainshuttle.model.encoders import TextEncoder, VideoEncoder, load_text_encoder, load_video_encoder, network_dtype
from domainshuttle.pipelines.buckets import Bucket, parse_bucket
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.index.samples import read_raw_sample
from domainshuttle.pipelines.index.table import IndexRow
from domainshuttle.pipelines.media.augment import AugmentedView, apply_view, augmented_view
from domainshuttle.pipelines.media.claims import reference_pixels, target_pixels
from domainshuttle.pipelines.media.conversions import noted_conversions
from domainshuttle.pipelines.media.decode import Pixels, fit_reference
from domainshuttle.pipelines.plan.feed import EncoderSources
from domainshuttle.pipelines.plan.pairing import single_pictures
from domainshuttle.pipelines.quarantine import of_sample
from domainshuttle.pipelines.sample import RawSample
from domainshuttle.pipelines.shards.tensors import EncodedSample


def load_encoders(sources: EncoderSources, device: str = "cpu") -> tuple[VideoEncoder, TextEncoder]:
    """Both encoders, on a device; the video encoder computes in float32 on each."""
    text = load_text_encoder(sources.text, sources.text_len, device, network_dtype(device))
    return load_video_encoder(sources.video, device), text


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


@dataclass(frozen=True)
class _Decoded:
    """A raw sample in pixels, fitted to its bucket: target [F,H,W,3], references and views [H,W,3]."""

    sample: RawSample
    target: Pixels
    references: list[Pixels]
    views: dict[int, Pixels]
    converted: tuple[str, ...]


def encode_rows(
    rows: list[IndexRow], video: VideoEncoder, text: TextEncoder, fps: float | None = None
) -> Iterator[tuple[IndexRow, EncodedSample | DataError]]:
    """Encodes raw samples, clips sampled at `fps`: each row comes back with its encoded sample, or with the reason why
    there is none. While one is encoded, a thread reads and decodes the next: no more than two are held in pixels."""
    encoder = SampleEncoder(video, text)
    waiting: deque[tuple[IndexRow, Future[_Decoded]]] = deque()
    with ThreadPoolExecutor(1, "decode") as pool:
        for row in rows:
            waiting.append((row, pool.submit(_decode_row, row, fps)))
            if len(waiting) > 1:
                yield _finished(encoder, *waiting.popleft())
        while waiting:
            yield _finished(encoder, *waiting.popleft())


def _decode_row(row: IndexRow, fps: float | None) -> _Decoded:
    with of_sample(f"{row.source}/{row.key}"), noted_conversions() as converted:
        sample = read_raw_sample(row)
        bucket = parse_bucket(row.bucket)
        target, pictures = decode_sample(sample, bucket, fps)
        # one view for the whole corpus: the pixels are gone when it is trained on
        views = {
            number: decode_reference(sample, number, bucket, augmented_view(0, 0, row.sample_id, number))
            for number in single_pictures([reference.subject for reference in sample.info.references])
        }
        return _Decoded(sample, target, pictures, views, tuple(sorted(converted)))


def _finished(
    encoder: SampleEncoder, row: IndexRow, decoding: Future[_Decoded]
) -> tuple[IndexRow, EncodedSample | DataError]:
    try:
        decoded = decoding.result()
        with of_sample(f"{row.source}/{row.key}"):
            return row, EncodedSample(
                key=decoded.sample.key,
                info=decoded.sample.info,
                target=_bits(encoder.target(decoded.target)),
                references=[_bits(encoder.picture(picture)) for picture in decoded.references],
                text=_bits(encoder.caption(decoded.sample.info.caption)),
                caption_tokens=encoder.caption_tokens(decoded.sample.info.caption),
                views={number: _bits(encoder.picture(picture)) for number, picture in decoded.views.items()},
                converted=decoded.converted,
            )
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
