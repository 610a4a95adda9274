"""What vLLM learns about freres when it loads its plug-ins. The models are imported when a run names one of them."""

from __future__ import annotations

import os

# Architectures that take bundles; a run names one with --hf-overrides.
ARCHITECTURES = {
    "FreResQwen2VLForConditionalGeneration": "freres_cli.integrations.vllm_models:BundleQwen2VL",
    "FreResQwen2_5_VLForConditionalGeneration": "freres_cli.integrations.vllm_models:BundleQwen25VL",
    "FreResQwen3VLForConditionalGeneration": "freres_cli.integrations.vllm_models:BundleQwen3VL",
}
CONNECTOR = "freres"


def register() -> None:
    """Register the architectures, and the media connector if VLLM_MEDIA_CONNECTOR names it. Through the entry point group
    ``vllm.general_plugins``, in every process of vLLM, as often as it likes."""
    from vllm import ModelRegistry

    for name, home in ARCHITECTURES.items():
        if name not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(name, home)
    if os.environ.get("VLLM_MEDIA_CONNECTOR") == CONNECTOR:
        from vllm.multimodal.media.connector import MEDIA_CONNECTOR_REGISTRY

        from freres_cli.integrations.vllm_connector import BundleConnector

        MEDIA_CONNECTOR_REGISTRY.register(CONNECTOR)(BundleConnector)
