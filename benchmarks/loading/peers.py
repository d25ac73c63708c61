"""The peers, each as its documentation says, with 2 worker processes and the same decoders as ours.

Run in the peers' environment (Ray's in the product's): python -m loading.peers measure|convert NAME KIND FOLDER
"""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from itertools import chain, count
from pathlib import Path
from typing import Any

import safetensors.torch
import simplejpeg
import torch
from loading.measure import Batch, measure
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

WORKERS = 2
BATCH = {"latents": 4, "pictures": 8}
CHUNK_BYTES = 64 << 20
"""MDS's and LitData's usual size of a chunk."""
Members = Mapping[str, Any]


def latents(members: Members) -> dict[str, Tensor]:
    """The tensors of an encoded sample's members."""
    return safetensors.torch.load(bytes(members["safetensors"]))


def pictures(members: Members) -> dict[str, Tensor]:
    """The decoded pictures [h,w,3] of a raw sample's members."""
    return {
        name: torch.from_numpy(simplejpeg.decode_jpeg(data, colorspace="RGB"))
        for name, data in sorted(members.items())
        if name.endswith("jpg")
    }


DECODERS: dict[str, Callable[[Members], dict[str, Tensor]]] = {"latents": latents, "pictures": pictures}


def shards(folder: Path) -> list[str]:
    return [str(path) for path in sorted(folder.glob("*.tar"))]


def flat(batches: Iterable[dict[str, Tensor]]) -> Iterator[Batch]:
    """Batches as lists of tensors."""
    for batch in batches:
        yield [tensor for _, tensor in sorted(batch.items())]


def webdataset(kind: str, folder: Path) -> Iterator[Batch]:
    """webdataset in torch's DataLoader; batches are made in the workers."""
    import webdataset as wds

    def collate(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        return default_collate([{k: v for k, v in sample.items() if not k.startswith("__")} for sample in samples])

    dataset = wds.WebDataset(shards(folder), shardshuffle=False).repeat().map(DECODERS[kind])
    batched = dataset.batched(BATCH[kind], collation_fn=collate, partial=False)
    return flat(DataLoader(batched, batch_size=None, num_workers=WORKERS))


def energon(kind: str, folder: Path) -> Iterator[Batch]:
    """Megatron-Energon on the same tars, with a cooker that decodes."""
    from megatron.energon import (
        Cooker,
        DefaultTaskEncoder,
        Sample,
        WorkerConfig,
        basic_sample_keys,
        edataclass,
        get_loader,
        get_train_dataset,
        stateless,
    )

    @edataclass
    class Decoded(Sample):
        tensors: dict[str, Tensor]

    @stateless
    def cook(sample: dict[str, Any]) -> Decoded:
        members = {name: data for name, data in sample.items() if not name.startswith("__")}
        return Decoded(**basic_sample_keys(sample), tensors=DECODERS[kind](members))

    class Encoder(DefaultTaskEncoder):
        decoder = None
        cookers = (Cooker(cook),)

        @stateless
        def batch(self, samples: list[Decoded]) -> dict[str, Tensor]:
            return default_collate([sample.tensors for sample in samples])

    dataset = get_train_dataset(
        folder,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=WORKERS),
        batch_size=BATCH[kind],
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        task_encoder=Encoder(),
    )
    return flat(get_loader(dataset))


def mds(kind: str, folder: Path) -> Iterator[Batch]:
    """MosaicML streaming on a copy in its own format."""
    from streaming import Stream, StreamingDataLoader, StreamingDataset

    class Decoding(StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            return stored(kind, super().__getitem__(at))

    stream = Stream(local=str(folder), repeat=64)
    dataset = Decoding(streams=[stream], batch_size=BATCH[kind], shuffle=False)
    return flat(StreamingDataLoader(dataset, batch_size=BATCH[kind], num_workers=WORKERS, drop_last=True))


def litdata(kind: str, folder: Path) -> Iterator[Batch]:
    """LitData on a copy in its own format."""
    from litdata import StreamingDataLoader, StreamingDataset

    class Decoding(StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            return stored(kind, super().__getitem__(index))

    dataset = Decoding(str(folder), shuffle=False, drop_last=True)
    loader = StreamingDataLoader(dataset, batch_size=BATCH[kind], num_workers=WORKERS, persistent_workers=True)
    while True:
        yield from flat(loader)


def stored(kind: str, sample: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a converted sample: latents were kept as arrays, pictures as JPEG."""
    if kind == "pictures":
        return pictures(sample)
    return {name: torch.as_tensor(array).view(torch.bfloat16) for name, array in sample.items()}


def ray_webdataset(kind: str, folder: Path) -> Iterator[Batch]:
    """Ray Data's own reader of tars, decoded in its tasks."""
    import numpy as np
    import ray.data

    decode = DECODERS[kind]

    def decoded(batch: dict[str, Any]) -> dict[str, Any]:
        names = [name for name in batch if not name.startswith("__")]
        samples = [decode({name: batch[name][i] for name in names}) for i in range(len(batch[names[0]]))]
        # numpy has no bf16
        plain = [{k: v.view(torch.int16) if v.dtype == torch.bfloat16 else v for k, v in s.items()} for s in samples]
        return {name: np.stack([sample[name].numpy() for sample in plain]) for name in plain[0]}

    dataset = ray.data.read_webdataset(shards(folder) * 64, decoder=None).map_batches(decoded, batch_size=BATCH[kind])
    for batch in dataset.iter_torch_batches(batch_size=BATCH[kind], prefetch_batches=2, drop_last=True):
        yield [t.view(torch.bfloat16) if t.dtype == torch.int16 else t for _, t in sorted(batch.items())]


def spdl(kind: str, folder: Path) -> Iterator[Batch]:
    """SPDL's pipeline of threads, with its own reader of tars."""
    from spdl.io import iter_tarfile
    from spdl.pipeline import PipelineBuilder

    def samples() -> Iterator[Members]:
        while True:
            for shard in shards(folder):
                members: dict[str, bytes] = {}
                current = None
                with Path(shard).open("rb") as file:
                    for path, content in iter_tarfile(file):
                        key, _, ending = path.partition(".")
                        if key != current and members:
                            yield members
                            members = {}
                        current, members[ending] = key, bytes(content)
                yield members

    builder = PipelineBuilder().add_source(samples()).pipe(DECODERS[kind], concurrency=WORKERS, output_order="input")
    pipeline = builder.aggregate(BATCH[kind]).pipe(default_collate).add_sink(2).build(num_threads=WORKERS)
    with pipeline.auto_stop():
        yield from flat(pipeline)


def daft(kind: str, folder: Path) -> Iterator[Batch]:
    """Daft's reader of tars, decoded by a function of its own runner; batches are made here."""
    import daft as library

    frame = library.read_webdataset(shards(folder))
    names = [name for name in frame.column_names if not name.startswith("__") and name != "json"]

    @library.func(return_dtype=library.DataType.python())
    def decoded(*files: Any) -> Any:
        members = {}
        for name, file in zip(names, files, strict=True):
            with file.open() as opened:
                members[name] = opened.read()
        return DECODERS[kind](members)

    frame = frame.select(decoded(*(library.col(name) for name in names)).alias("tensors"))
    rows = chain.from_iterable(frame.iter_rows() for _ in count())
    while True:
        yield from flat([default_collate([next(rows)["tensors"] for _ in range(BATCH[kind])])])


PEERS = {
    "webdataset": webdataset,
    "energon": energon,
    "mds": mds,
    "litdata": litdata,
    "ray": ray_webdataset,
    "spdl": spdl,
    "daft": daft,
}
CONVERTED = ("mds", "litdata")


def tar_samples(kind: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Samples for a peer's own format: bit patterns of latents as int16 arrays, pictures as JPEG bytes."""
    import webdataset as wds

    for sample in wds.WebDataset(shards(folder), shardshuffle=False):
        if kind == "pictures":
            yield {name.replace(".jpg", "jpg"): data for name, data in sample.items() if name.endswith("jpg")}
        else:
            yield {name.replace(".", ""): t.view(torch.int16).numpy() for name, t in latents(sample).items()}


def convert(name: str, kind: str, folder: Path, target: Path) -> None:
    """Makes what a peer needs: a copy in its format in `target`, or Energon's index beside the tars."""
    if name == "energon":
        from megatron.energon.flavors import BaseWebdatasetFactory

        names = [Path(shard).name for shard in shards(folder)]
        BaseWebdatasetFactory.prepare_dataset(folder, names, split_parts_ratio=[("train", 1.0)], workers=1)
        crude = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
        (folder / ".nv-meta" / "dataset.yaml").write_text(crude)
    elif name == "mds":
        from streaming import MDSWriter

        first = next(tar_samples(kind, folder))
        columns = {
            key: "bytes" if isinstance(value, bytes) else f"ndarray:int16:{','.join(map(str, value.shape))}"
            for key, value in first.items()
        }
        with MDSWriter(out=str(target), columns=columns, size_limit=CHUNK_BYTES) as writer:
            for sample in tar_samples(kind, folder):
                writer.write(sample)
    elif name == "litdata":
        from litdata.streaming.writer import BinaryWriter

        writer = BinaryWriter(str(target), chunk_bytes=CHUNK_BYTES)
        for number, sample in enumerate(tar_samples(kind, folder)):
            writer[number] = {
                key: value if isinstance(value, bytes) else torch.from_numpy(value) for key, value in sample.items()
            }
        writer.done()
        writer.merge()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("verb", choices=["measure", "convert"])
    parser.add_argument("name", choices=PEERS)
    parser.add_argument("kind", choices=BATCH)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", type=Path, help="where the converted copy goes")
    parser.add_argument("--seconds", type=float, default=3.0)
    arguments = parser.parse_args()
    if arguments.verb == "convert":
        convert(arguments.name, arguments.kind, arguments.folder, arguments.target)
        return
    if arguments.name == "ray":
        import logging

        import ray

        ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False
    start = PEERS[arguments.name]
    print(json.dumps(asdict(measure(lambda: start(arguments.kind, arguments.folder), arguments.seconds))), flush=True)


if __name__ == "__main__":
    main()
