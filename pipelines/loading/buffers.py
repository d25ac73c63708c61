"""Staging: memory for batches that is used again once the last tensor over it is gone.

Fresh memory costs a page fault every 4 KiB, as much as the copy into it; page-locked memory costs far more to make.
"""

import threading
import weakref
from collections import deque
from math import prod

import numpy as np
import torch
from torch import Tensor


class Staging:
    """Hands out tensors in blocks of memory that come back by themselves. Safe to share between threads.

    With `pinned` the blocks are page-locked, so that copies to the accelerator need not wait; the tensors must then be
    kept until the copy is done. At most `spare` bytes are kept that nobody uses.
    """

    def __init__(self, pinned: bool = False, spare: int = 256 << 20) -> None:
        self.pinned, self.spare = pinned, spare
        self._free: list[np.ndarray] = []
        self._lock = threading.Lock()
        # apart from the free ones, since a block can come back at any point of any thread, also under the lock
        self._returned: deque[np.ndarray] = deque()

    def empty(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """A tensor of any content, on the CPU."""
        size = prod(shape) * dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=dtype)
        block = self._take(size)
        lease = block[:size]
        # the tensor's storage holds this array, so its end is the end of the last tensor and view over it
        weakref.finalize(lease, self._returned.append, block).atexit = False
        return torch.from_numpy(lease).view(dtype).view(shape)

    def _take(self, size: int) -> np.ndarray:
        with self._lock:
            while self._returned:
                self._free.append(self._returned.popleft())
            for number, block in enumerate(self._free):
                if size <= block.nbytes <= 2 * size:
                    return self._free.pop(number)
            while self._free and sum(one.nbytes for one in self._free) > self.spare:
                del self._free[0]
        if self.pinned:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
        return np.empty(size, np.uint8)
