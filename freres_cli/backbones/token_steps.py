"""Run the tokens of an answer one by one, on a GPU by a recorded graph where that can be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from freres_cli.backbones.base import LanguageModel
from freres_cli.backbones.engine import VideoPrefix, memory_of
from freres_cli.backbones.graph_decoding import StepGraph, can_record

# Ours. A step is recorded once an answer has gone on for so many tokens: recording takes as long as a few of them. It has
# room for so many more rows; every step reads all of it.
STEPS_BEFORE_RECORDING = 2
ROOM_FOR_ANSWER = 512


class TokenSteps:
    """The steps of one answer. ``model`` and ``prefix``: the language model and the video it has prefilled. ``cache``: what
    ``prefix`` lends."""

    def __init__(self, model: LanguageModel, prefix: VideoPrefix, cache: Any) -> None:
        self._model, self._prefix, self._cache = model, prefix, cache
        self._num_run = 0
        self._num_recorded = 0
        self._graph: StepGraph | None = None

    @torch.no_grad()
    def run(self, token: int, position: float) -> Tensor:
        """The logits after ``token``, (vocabulary,) float32, whose position is ``position``."""
        place = self._cache.get_seq_length() + self._num_recorded
        with memory_of(self._model, place + 1):
            if self._num_run >= STEPS_BEFORE_RECORDING and (self._graph is None or place >= self._graph.num_rows):
                self._take_over(place)
                self._graph = self._find_graph(token, place, position)
            self._num_run += 1
            if self._graph is not None:
                self._num_recorded += 1
                return self._graph.run(token, place, position)
            hidden = self._model.decode(self._model.text_rows([token], place, position), self._cache)
            return self._model.logits(hidden)[0]

    def _take_over(self, place: int) -> None:
        """Let the cache have the rows that a graph has written, up to ``place``, and drop the graph with its buffers."""
        if self._graph is None:
            return
        for layer in self._cache.layers:
            layer.keys, layer.values = (buffer[..., :place, :] for buffer in layer.buffers)
        self._num_recorded = 0
        self._graph = self._prefix.graph = None

    def _find_graph(self, token: int, place: int, position: float) -> StepGraph | None:
        """The graph of an earlier answer about this video, or a new one, recorded with a step that is then run again;
        ``None`` if there can be none."""
        model, prefix, cache = self._model, self._prefix, self._cache
        if prefix.cannot_record or not can_record(model, cache):
            return None
        known = prefix.graph
        if known is None or known.num_rows <= place or not known.is_of(cache):
            prefix.graph = known = None  # before there are larger buffers, those that it keeps have to go
            try:
                for layer in cache.layers:
                    layer.make_room(min(place + ROOM_FOR_ANSWER, model.max_context_tokens))
                graph = StepGraph(model, cache)
                graph.clear_from(place)
                graph.run(token, place, position)
                prefix.graph = graph
            except RuntimeError as error:
                why = str(error).strip().partition("\n")[0]
                note = f"answers take longer: a step of the decoder could not be recorded as a CUDA graph: {why}"
                prefix.notes, prefix.cannot_record = (*prefix.notes, note), True
        else:
            known.clear_from(place)
        found: StepGraph | None = prefix.graph
        return found
