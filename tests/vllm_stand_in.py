"""The parts of vLLM 0.32 that our processors and our connector meet, so that they are tested where vLLM is not installed."""

from __future__ import annotations

import base64
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Generic, TypeVar

import pytest

T = TypeVar("T")
OURS = ("freres_cli.integrations.vllm_processing", "freres_cli.integrations.vllm_connector")


class VLLMValidationError(Exception):
    pass


class DictEmbeddingItems:
    def __init__(self, data: Mapping[str, Any], modality: str, required_fields: set[str], fields_factory: Any) -> None:
        assert required_fields <= data.keys() and required_fields <= fields_factory(data).keys()
        self.data, self.modality = data, modality


class MediaIO(Generic[T]):
    pass


class MediaConnector:
    """Its own connector for data: and file:// URLs below one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load_from_url(self, url: str, media_io: Any) -> Any:
        if url.startswith("data:"):
            kind, _, data = url[5:].partition(";base64,")
            return media_io.load_base64(kind, data)
        path = Path(url.removeprefix("file://"))
        if self.folder not in path.parents:
            raise ValueError("must be a subpath")
        return media_io.load_file(path)


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let our files be imported with the parts above. They are forgotten again with the ``monkeypatch``."""
    fields = SimpleNamespace(
        flat_from_sizes=lambda modality, sizes, **_: (modality, sizes.tolist()),
        batched=lambda modality, **_: (modality, None),
    )
    parts: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.exceptions": {"VLLMValidationError": VLLMValidationError},
        "vllm.multimodal": {},
        "vllm.multimodal.inputs": {"MultiModalFieldConfig": fields},
        "vllm.multimodal.parse": {"DictEmbeddingItems": DictEmbeddingItems},
        "vllm.multimodal.processing": {"PromptReplacement": SimpleNamespace, "PromptUpdateDetails": SimpleNamespace},
        "vllm.multimodal.media": {},
        "vllm.multimodal.media.base": {"MediaIO": MediaIO},
        "vllm.multimodal.media.connector": {"MediaConnector": MediaConnector},
    }
    for name, held in parts.items():
        module = ModuleType(name)
        vars(module).update(held)
        monkeypatch.setitem(sys.modules, name, module)
    for name in OURS:
        # Noted as absent, so that undoing removes what the tests import.
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        del sys.modules[name]


def data_url(content: bytes) -> str:
    return f"data:application/octet-stream;base64,{base64.b64encode(content).decode()}"
