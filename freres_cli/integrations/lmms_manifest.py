"""What lmms-eval learns about freres when it lists its models; the class itself is imported when a run names it."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """Return the ``ModelManifest`` that lmms-eval asks for through the entry point group ``lmms_eval.models``."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("freres", simple_class_path="freres_cli.integrations.lmms_eval.FreRes")
