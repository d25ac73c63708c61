"""The samples that all loaders read: latents as they are trained on, and pictures as they come from a corpus.

Both are written by the product's own writer, with its index beside them.
Run in the product's environment: python -m loading.data latents|pictures FOLDER SAMPLES
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image
from safetensors.torch import save_file

from domainshuttle.pipelines.buckets import Bucket
from domainshuttle.pipelines.index.parts import EMPTY_CAPTION_NAME, INDEX_NAME
from domainshuttle.pipelines.index.table import IndexMetadata, IndexRow, write_index
from domainshuttle.pipelines.sample import RawSample, Reference, SampleInfo, Subject
from domainshuttle.pipelines.shards.tar import ShardWriter
from domainshuttle.pipelines.shards.tensors import EncodedSample

SHARD_BYTES = 64 << 20
REFERENCES = 4
TEXT_LENGTH, TEXT_WIDTH = 64, 4096
VIDEO = Bucket(81, 480, 832)
PICTURE, REFERENCE_SIZE = Bucket(1, 480, 832), (480, 480)
DISTINCT = 32
"""Different samples that are made; the shards repeat them, each time in another place of the file."""


def write_latents(folder: Path, samples: int) -> None:
    """Encoded clips of 81 frames at 480x832 with four references and their captions' states: 5.5 MB each."""
    rng = np.random.default_rng(0)

    def tensor(*shape: int) -> np.ndarray:
        return torch.from_numpy(rng.standard_normal(shape, np.float32)).bfloat16().view(torch.uint16).numpy()

    def made() -> Iterator[EncodedSample]:
        for number in range(DISTINCT):
            yield EncodedSample(
                key=f"clip-{number}",
                info=_info("video", VIDEO, (VIDEO.height, VIDEO.width)),
                target=tensor(*VIDEO.latent_shape),
                references=[tensor(*VIDEO.reference_shape) for _ in range(REFERENCES)],
                text=tensor(TEXT_LENGTH, TEXT_WIDTH),
            )

    _write(folder, "latents", VIDEO, [(sample.info, sample.members()) for sample in made()], samples)
    empty = torch.zeros(1, TEXT_WIDTH, dtype=torch.bfloat16)
    save_file({"text": empty}, folder / EMPTY_CAPTION_NAME)


def write_pictures(folder: Path, samples: int) -> None:
    """JPEGs: a target of 480x832 and four references of 480x480 a sample."""
    rng = np.random.default_rng(0)
    made = []
    for number in range(min(DISTINCT, samples)):
        info = _info("image", PICTURE, REFERENCE_SIZE)
        sizes = {"jpg": (PICTURE.height, PICTURE.width)} | {one.file: one.size for one in info.references}
        files = {name: _jpeg(_photo(rng, *size)) for name, size in sizes.items()}
        made.append((info, RawSample(f"photo-{number}", info, files).members()))
    _write(folder, "pictures", PICTURE, made, samples)


def _info(kind: str, bucket: Bucket, reference: tuple[int, int]) -> SampleInfo:
    # one subject a reference, so that the pairing shows all of them in every epoch
    return SampleInfo(
        caption="a caption",
        source="benchmark",
        kind=kind,
        fps=16.0 if kind == "video" else None,
        frames=bucket.frames,
        size=(bucket.height, bucket.width),
        subjects=[Subject(id=number, word="thing", domain=1) for number in range(REFERENCES)],
        references=[
            Reference(file=f"ref{number}.jpg", subject=number, origin="same_clip", size=reference)
            for number in range(REFERENCES)
        ],
    )


def _write(folder: Path, name: str, bucket: Bucket, made: list, samples: int) -> None:
    with ShardWriter(folder, name, SHARD_BYTES) as writer:
        for number in range(samples):
            writer.write(f"{name}-{number:06d}", made[number % len(made)][1])
    stage = "encoded" if name == "latents" else "raw"
    rows = (IndexRow.of(entry, made[0][0], bucket) for entry in writer.entries)
    write_index(folder / INDEX_NAME, rows, IndexMetadata(corpus=name, stage=stage))


def _jpeg(picture: np.ndarray) -> bytes:
    return simplejpeg.encode_jpeg(picture, quality=90, colorspace="RGB", colorsubsampling="420")  # as cameras do


def _photo(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Something that takes a JPEG coder as long as a photograph: light that varies over all scales, edges, fine grain.

    The amplitudes fall with the frequency, as they do in pictures of nature.
    """
    canvas = np.full((height, width, 3), 128.0, np.float32)
    for scale in (256, 128, 64, 32, 16, 8, 4, 2):
        small = rng.standard_normal((height // scale + 2, width // scale + 2, 3), np.float32)
        small = small.mean(2, keepdims=True) * 0.8 + small * 0.2  # colours vary less than light
        channels = [Image.fromarray(small[..., c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(3)]
        canvas += np.stack(channels, 2) * 3.2 * scale**0.5
    for _ in range(12):  # things with edges
        top, left = int(rng.integers(height)), int(rng.integers(width))
        canvas[top : top + height // 4, left : left + width // 4] += rng.uniform(-60, 60, 3).astype(np.float32)
    return np.clip(canvas + rng.normal(0, 2, canvas.shape), 0, 255).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["latents", "pictures"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("samples", type=int)
    arguments = parser.parse_args()
    {"latents": write_latents, "pictures": write_pictures}[arguments.kind](arguments.folder, arguments.samples)


if __name__ == "__main__":
    main()
