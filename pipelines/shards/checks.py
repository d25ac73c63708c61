"""What must hold of a sample in a shard, for indexing and verifying. What does not hold is a `SampleFault`."""

from collections.abc import Iterable

import numpy as np

from domainshuttle.pipelines.buckets import SPACE_STRIDE, TIME_STRIDE, Bucket
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.quarantine import SampleFault
from domainshuttle.pipelines.sample import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, Buffer, RawSample, SampleInfo
from domainshuttle.pipelines.shards.tensors import EncodedSample

MOST_DESCRIPTION_BYTES = 16 << 20
ENCODED_MEMBERS = {"json", "safetensors"}


def read_description(key: str, extensions: Iterable[str], data: Buffer) -> SampleInfo:
    """The sample's `key.json`, parsed and checked; `data` are its bytes (empty where there is none)."""
    if "json" not in (held := sorted(extensions)):
        raise SampleFault("missing description", f"{key}: no {key}.json; it has {held}")
    try:
        return SampleInfo.from_json(data, f"{key}.json")
    except (DataError, RecursionError) as error:
        raise SampleFault("bad description", str(error)) from error


def check_files(key: str, info: SampleInfo, extensions: Iterable[str]) -> None:
    """Whether a raw sample has its target, the references that `info` names, and nothing else (which is not opened)."""
    files = set(extensions) - {"json"}
    references = {reference.file for reference in info.references}
    try:
        RawSample(key, info, dict.fromkeys(files, b""))
    except DataError as error:
        allowed = IMAGE_EXTENSIONS if info.kind == "image" else VIDEO_EXTENSIONS
        if references - files:
            kind = "missing reference"
        elif "safetensors" in files:
            kind = "encoded sample"
        else:
            kind = "unknown file" if files - references - {info.source_clip} - set(allowed) else "missing target"
        raise SampleFault(kind, str(error)) from error


def check_tensors(key: str, info: SampleInfo, extensions: Iterable[str], data: Buffer) -> tuple[EncodedSample, Bucket]:
    """An encoded sample, its tensors views of `data`, and the bucket of its latents; names, types and shapes must
    fit."""
    if unknown := sorted(set(extensions) - ENCODED_MEMBERS):
        raise SampleFault(
            "unknown file", f"{key}: {unknown} beside {sorted(ENCODED_MEMBERS)}; an encoded sample has no others"
        )
    if "safetensors" not in extensions:
        raise SampleFault("missing target", f"{key}: no {key}.safetensors; encode the corpus again")
    try:
        sample = EncodedSample.from_bytes(key, info, data)
        _, frames, height, width = sample.target.shape
        bucket = Bucket(1 + TIME_STRIDE * (frames - 1), SPACE_STRIDE * height, SPACE_STRIDE * width)
    except DataError as error:
        raise SampleFault("bad tensors", str(error)) from error
    for name, array in sample.tensors().items():
        if name not in ("target", "text") and array.shape != bucket.reference_shape:
            raise SampleFault(
                "bad tensors",
                f"{key}: {name} has shape {list(array.shape)}; its target's bucket {bucket} wants "
                f"{list(bucket.reference_shape)}",
            )
    return sample, bucket


def check_finite(sample: EncodedSample) -> None:
    """Whether every value is a number: in bf16 an exponent of all ones is infinity or none."""
    for name, bits in sample.tensors().items():
        if wrong := int(np.count_nonzero((bits & 0x7F80) == 0x7F80)):
            raise SampleFault("not finite", f"{sample.key}: {wrong} of {bits.size} values of {name}; encode it again")
