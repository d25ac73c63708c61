"""To the accelerator: micro-batches are copied ahead of their use, beside the computation."""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from domainshuttle.model.batch import TrainingBatch
from domainshuttle.pipelines.loading.reader import MicroBatch

S = TypeVar("S")
D = TypeVar("D")


def on_device(
    micro_batches: Iterator[MicroBatch[TrainingBatch]], device: torch.device
) -> Iterator[MicroBatch[TrainingBatch]]:
    """The same micro-batches on a CUDA device, copied on a stream and a thread of their own while others are used.

    Their memory must be pinned, else the copies hold up the device. Masks that mask nothing become None, as in
    `TrainingBatch.to`.
    """
    stream = torch.cuda.Stream(device)

    def copied(micro: MicroBatch[TrainingBatch]) -> MicroBatch[TrainingBatch]:
        with torch.cuda.stream(stream):
            moved = replace(micro, batch=micro.batch.to(device))
        stream.synchronize()  # until then the staged memory must not go back
        return moved

    for micro in prepared_ahead(micro_batches, copied):
        using = torch.cuda.current_stream(device)
        for field in fields(micro.batch):
            value = getattr(micro.batch, field.name)
            if isinstance(value, Tensor):
                # made on the copying stream: its memory must not be given to the next copy while this one uses it
                value.record_stream(using)
        yield micro


def prepared_ahead(items: Iterator[S], prepare: Callable[[S], D]) -> Iterator[D]:
    """`prepare` of each item, in order, done on a thread that is at most two items ahead of the caller."""
    ready: queue.Queue[tuple[D | None, BaseException | None]] = queue.Queue(maxsize=1)
    closed = threading.Event()

    def offer(item: D | None, error: BaseException | None = None) -> None:
        while not closed.is_set():
            try:
                return ready.put((item, error), timeout=0.2)
            except queue.Full:
                continue

    def run() -> None:
        try:
            for item in items:
                offer(prepare(item))
                if closed.is_set():
                    return
            offer(None, StopIteration())
        except BaseException as error:
            offer(None, error)

    threading.Thread(target=run, name="loader-transfer", daemon=True).start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
    finally:
        closed.set()
