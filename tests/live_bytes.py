"""How much memory the tensors that some code makes take at one time, by the sizes of their storages."""

from __future__ import annotations

import weakref
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.labelled_device import LabelledTensor


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages made inside, while any tensor of them is alive. ``peak``: the most at one time."""

    def __init__(self):
        super().__init__()
        self.users, self.now, self.peak = Counter(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return out

    def add(self, tensor):
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        if not self.users[key]:
            self.now += num_bytes
            self.peak = max(self.peak, self.now)
        self.users[key] += 1
        weakref.finalize(tensor, self.drop, key, num_bytes)

    def drop(self, key, num_bytes):
        self.users[key] -= 1
        if not self.users[key]:
            self.now -= num_bytes


class DeviceBytes(LiveBytes):
    """Counts only tensors that are labelled as on a device, or are on torch's meta device."""

    def add(self, tensor):
        if isinstance(tensor, LabelledTensor):
            super().add(tensor.elem)
        elif tensor.is_meta:
            super().add(tensor)
