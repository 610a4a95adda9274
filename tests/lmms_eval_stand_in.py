"""The parts of lmms-eval 0.7.3 that our model meets, so that it is tested where lmms-eval is not installed."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest

OURS = "freres_cli.integrations.lmms_eval"


@dataclass
class TokenCounts:
    input_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_tokens: int | None = None


@dataclass
class GenerationResult:
    text: str
    token_counts: TokenCounts | None = None


@dataclass
class Instance:
    request_type: str
    arguments: tuple[Any, ...]
    idx: int
    metadata: dict[str, Any]

    @property
    def args(self) -> tuple[Any, ...]:
        return self.arguments


class CacheHook:
    def add_partial(self, *_: Any) -> None:
        pass


class Lmms:
    """Its base class of models, without what a model overrides."""

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.cache_hook = CacheHook()
        self.task_dict: dict[str, Any] = {}

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let our model be imported with the parts above. It is forgotten again with the ``monkeypatch``."""
    instance, model = ModuleType("lmms_eval.api.instance"), ModuleType("lmms_eval.api.model")
    vars(instance).update(TokenCounts=TokenCounts, GenerationResult=GenerationResult, Instance=Instance)
    vars(model).update(lmms=Lmms)
    for module in (ModuleType("lmms_eval"), ModuleType("lmms_eval.api"), instance, model):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    # Noted as absent, so that undoing removes what the tests import.
    monkeypatch.delitem(sys.modules, OURS, raising=False)
    monkeypatch.setitem(sys.modules, OURS, ModuleType(OURS))
    del sys.modules[OURS]
