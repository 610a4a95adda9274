"""freres: video made cheap for video language models.

The Python API, imported when first used: ``Compressor`` and ``load_bundle``, with ``Bundle`` and ``Session`` that they
return. See freres(3).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from freres_cli.backbones.generation import Sampling
    from freres_cli.pipeline.bundle import Bundle, load_bundle
    from freres_cli.pipeline.compressor import Compressor
    from freres_cli.pipeline.models import Models
    from freres_cli.pipeline.query import Query
    from freres_cli.pipeline.session import Session
    from freres_cli.records import Answer, VideoTokens

__version__ = "0.1.0"

_HOMES = {
    "Answer": "freres_cli.records",
    "Bundle": "freres_cli.pipeline.bundle",
    "Compressor": "freres_cli.pipeline.compressor",
    "Models": "freres_cli.pipeline.models",
    "Query": "freres_cli.pipeline.query",
    "Sampling": "freres_cli.backbones.generation",
    "Session": "freres_cli.pipeline.session",
    "VideoTokens": "freres_cli.records",
    "load_bundle": "freres_cli.pipeline.bundle",
}
__all__ = [
    "Answer",
    "Bundle",
    "Compressor",
    "Models",
    "Query",
    "Sampling",
    "Session",
    "VideoTokens",
    "load_bundle",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
