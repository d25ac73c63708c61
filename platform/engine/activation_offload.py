"""Inputs of blocks in the host's memory, from a forward pass to its backward pass.

On a GPU they are copied on a stream of their own, beside the computation: out while their block computes, and back
while the block behind it is computed again. At most two are back on the device at a time.
"""

import contextlib
import weakref

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Offload:
    """The inputs of one model's blocks that wait on the host, in the order in which they went."""

    def __init__(self) -> None:
        self._order: list[weakref.ref[_Input]] = []
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def saving(self, kept: Tensor) -> saved_tensors_hooks:
        """While it is active, `kept` is saved on the host; all else, such as the text of all blocks, stays."""
        place, shape = kept.data_ptr(), kept.shape  # what is saved holds `pack`, which must not hold the tensor itself

        def pack(tensor: Tensor) -> "Tensor | _Input":
            if tensor.data_ptr() != place or tensor.shape != shape:
                return tensor
            one = _Input(tensor, self._stream(tensor.device))
            self._order.append(weakref.ref(one))
            return one

        def unpack(saved: "Tensor | _Input") -> Tensor:
            return saved if isinstance(saved, Tensor) else self._take(saved)

        return saved_tensors_hooks(pack, unpack)

    def _take(self, one: "_Input") -> Tensor:
        value = one.take()
        while self._order and self._order.pop()() is not one:
            pass  # of blocks behind it, or of passes whose backward never came
        if self._order and (next_one := self._order[-1]()) is not None:
            next_one.fetch()  # which is wanted when this block is done
        return value

    def _stream(self, device: torch.device) -> torch.cuda.Stream | None:
        if device.type != "cuda":
            return None
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


class _Input:
    """A tensor on the host, and on its way back; the stream orders its two copies."""

    def __init__(self, tensor: Tensor, stream: torch.cuda.Stream | None) -> None:
        self._device, self._stream = tensor.device, stream
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=stream is not None)
        self._fetched: Tensor | None = None
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(self._device))
            tensor.record_stream(stream)  # its memory is not used again before it is copied
        with self._beside():
            self._host.copy_(tensor, non_blocking=True)

    def fetch(self) -> None:
        """Begins the copy to the device, unless it has begun."""
        if self._fetched is None:
            with self._beside():
                self._fetched = self._host.to(self._device, non_blocking=True)

    def take(self) -> Tensor:
        """The tensor on its device, for what is queued on the current stream from now on."""
        self.fetch()
        value, self._fetched = self._fetched, None
        assert value is not None
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            value.record_stream(current)
        return value

    def _beside(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
