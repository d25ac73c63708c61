"""Staging and transfer: memory that comes back, batches that are prepared ahead.

Run: python -m pytest tests/pipelines/loading/test_buffers.py
"""

import gc
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields

import pytest
import torch

from domainshuttle.model.batch import TrainingBatch
from domainshuttle.pipelines.loading.buffers import Staging
from domainshuttle.pipelines.loading.device_prefetch import on_device, prepared_ahead
from domainshuttle.pipelines.loading.reader import MicroBatch


def test_memory_comes_back_with_the_last_view_and_not_before() -> None:
    staging = Staging()
    first = staging.empty(1000, 3)
    assert first.shape == (1000, 3) and first.dtype == torch.bfloat16
    place = first.data_ptr()
    row = first.fill_(1.0)[999]
    del first
    second = staging.empty(1000, 3).fill_(2.0)
    assert second.data_ptr() != place
    assert row.tolist() == [1.0, 1.0, 1.0]
    del row
    gc.collect()
    # int64 of the same memory, a little smaller
    assert staging.empty(700, dtype=torch.int64).data_ptr() == place


def test_blocks_far_too_large_are_not_used_and_spare_ones_are_let_go() -> None:
    staging = Staging(spare=4000)
    blocks = [staging.empty(size, dtype=torch.uint8) for size in (3000, 3000, 3000)]
    places = {block.data_ptr() for block in blocks}
    del blocks
    small = staging.empty(1000, dtype=torch.uint8)
    assert small.data_ptr() not in places
    assert sum(block.nbytes for block in staging._free) <= 4000
    assert staging.empty(0, 5).shape == (0, 5)


def test_threads_never_share_a_block() -> None:
    staging, wrong = Staging(), []

    def work(mark: int) -> None:
        for number in range(300):
            block = staging.empty(64 + number % 3, dtype=torch.int64).fill_(mark)
            time.sleep(0)
            if not bool((block == mark).all()):
                wrong.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_items_are_prepared_in_order_and_at_most_two_ahead() -> None:
    prepared: list[int] = []

    def prepare(item: int) -> int:
        prepared.append(item)
        return item * 10

    found = prepared_ahead(iter(range(20)), prepare)
    assert next(found) == 0
    time.sleep(0.3)
    assert prepared == [0, 1, 2]
    assert list(found) == [number * 10 for number in range(1, 20)]


def test_an_error_arrives_after_what_came_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("no third")

    found = prepared_ahead(items(), str)
    assert [next(found), next(found)] == ["1", "2"]
    with pytest.raises(ValueError, match="no third"):
        next(found)


def test_leaving_early_ends_the_thread() -> None:
    before = threading.active_count()
    found = prepared_ahead(iter(range(1000)), str)
    next(found)
    found.close()  # type: ignore[attr-defined]
    until = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.05)
    assert threading.active_count() <= before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_come_out_on_the_device_unchanged() -> None:
    staging = Staging(pinned=True)

    def staged(batch: TrainingBatch) -> TrainingBatch:
        values = {field.name: getattr(batch, field.name) for field in fields(batch)}
        tensors = {
            name: staging.empty(*value.shape, dtype=value.dtype).copy_(value)
            for name, value in values.items()
            if isinstance(value, torch.Tensor)
        }
        return TrainingBatch(**{**values, **tensors})

    made = [TrainingBatch.fake(4, frames=8, height=32, width=32, seed=seed, mask_tail=True) for seed in range(20)]
    micros = (MicroBatch(number, 0, staged(batch), [], Counter()) for number, batch in enumerate(made))
    for micro, batch in zip(on_device(micros, torch.device("cuda", 0)), made, strict=True):
        for field in fields(batch):
            value = getattr(micro.batch, field.name)
            if isinstance(value, torch.Tensor):
                assert value.is_cuda and value.cpu().equal(getattr(batch, field.name)), field.name
