"""Run a decoder on one token after another as a CUDA graph: the device starts all kernels of a step by itself.

A step of an 8B model has a thousand kernels, which the host takes longer to start than the device to run. A graph needs
tensors that stay where they are and keep their shapes. So a step reads the whole buffers of the cache, of which rows
that are not filled yet are hidden, and writes its row at a place that is itself a tensor.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from freres_cli.backbones.angles import CHANGING_ROPE
from freres_cli.backbones.base import LanguageModel
from freres_cli.backbones.cache import ReservedLayer
from freres_cli.backbones.sizes import find_rope_kind, has_experts
from freres_cli.devices import WAITING


class _WholeBuffers(CacheLayerMixin):
    """One layer's buffers, (1, heads, rows, d), as a cache. ``place``: (1,) int64, the row to write."""

    def __init__(self, buffers: tuple[Tensor, Tensor], place: Tensor) -> None:
        super().__init__()
        self.keys, self.values = buffers
        self._place = place
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: there are buffers."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Write one row, (1, heads, 1, d), and return the whole buffers."""
        assert self.keys is not None and self.values is not None
        return (
            self.keys.index_copy_(2, self._place, key_states),
            self.values.index_copy_(2, self._place, value_states),
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Of a mask, which the attention here does not take."""
        return self.get_max_length(), 0

    def get_seq_length(self) -> int:
        """Rows before the last of the buffers. A recorded step cannot read how many are filled, and does not need it."""
        return self.get_max_length() - 1

    def get_max_length(self) -> int:
        """Rows of the buffers."""
        assert self.keys is not None
        return int(self.keys.shape[2])


class StepGraph:
    """One step of a decoder on the buffers of one cache, recorded when it is first run.

    ``model``: it has a ReservedLayer for each layer. ``cache``: its rows have room for those to come.
    """

    def __init__(self, model: LanguageModel, cache: Any) -> None:
        self.model = model
        self._buffers = [layer.buffers for layer in cache.layers]
        self.num_rows = int(self._buffers[0][0].shape[2])
        device = model.device
        self._token = torch.zeros(1, dtype=torch.int64, device=device)
        self._place = torch.zeros(1, dtype=torch.int64, device=device)
        self._position = torch.zeros((), dtype=torch.float32, device=device)
        self._rows = torch.arange(self.num_rows, device=device)
        self._cache = Cache(layers=[_WholeBuffers(pair, self._place) for pair in self._buffers])
        self._replay: Callable[[], Any] | None = None
        self._logits = torch.empty(0)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of a prefix has buffers of its own, for which its step is recorded anew.
        return type(None), ()

    def is_of(self, cache: Any) -> bool:
        """Whether it runs on the buffers of this cache."""
        pairs = zip(self._buffers, (layer.buffers for layer in cache.layers), strict=True)
        return all(mine is other for mine, other in pairs)

    def clear_from(self, place: int) -> None:
        """Zero the rows from ``place`` on. What was never written, or by an answer that failed, may not be finite."""
        for buffer in (buffer for pair in self._buffers for buffer in pair):
            buffer[..., place:, :].zero_()

    def run(self, token: int, place: int, position: float) -> Tensor:
        """The logits after ``token``, (vocabulary,) float32, whose row of the cache is ``place``, at ``position``."""
        self._token.fill_(token)
        self._place.fill_(place)
        self._position.fill_(position)
        if self._replay is None:
            self._replay = self._record()
        self._replay()
        return self._logits

    def _step(self) -> None:
        rows = self.model.step_rows(self._token, self._place, self._position)
        key_bias = torch.zeros(self._rows.shape, device=self._rows.device)
        key_bias.masked_fill_(self._rows > self._place, -torch.inf)
        self._logits = self.model.logits(self.model.decode(rows, self._cache, key_bias=key_bias))[0]

    def _record(self) -> Callable[[], Any]:
        device = self.model.device
        here, stream = torch.cuda.current_stream(device), _side_stream(device)
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        stream.wait_stream(here)
        try:
            with WAITING, torch.cuda.stream(stream):
                # Kernels are loaded, and workspaces made, by a step that is not recorded.
                self._step()
                # Not torch.cuda.graph, which collects garbage and gives up all cached memory first.
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    self._step()
                finally:
                    graph.capture_end()
        except RuntimeError:
            _clean_up(device, stream, pool)
            raise
        finally:
            here.wait_stream(stream)
        return graph.replay


def _clean_up(device: torch.device, stream: torch.cuda.Stream, pool: Any) -> None:
    """Undo what a recording that failed leaves behind in PyTorch.

    It would no longer give up cached memory before memory runs out, and draw no random numbers on this device, until another
    recording has ended well.
    """
    with contextlib.suppress(AttributeError, RuntimeError):
        torch._C._cuda_endAllocateToPool(device.index or 0, pool)
    with contextlib.suppress(RuntimeError), WAITING, torch.cuda.stream(stream):
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        torch.zeros(1, device=device)
        graph.capture_end()


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that steps are recorded on, one for a device: the libraries keep memory for each stream."""
    return torch.cuda.Stream(device)


def can_record(model: LanguageModel, cache: Any) -> bool:
    """Whether a step of this model on this cache always runs the same kernels on the same rows, on a GPU."""
    config = model.decoder.config
    return (
        model.device.type == "cuda"
        and torch.cuda.is_available()
        and model.attention != "eager"
        and not has_experts(config)
        # What a replay reads may be the frequencies of another video by then.
        and find_rope_kind(config) not in CHANGING_ROPE
        and all(type(layer) is ReservedLayer for layer in cache.layers)
        # Layers after a pruning hold fewer rows.
        and len({layer.get_seq_length() for layer in cache.layers}) == 1
    )
