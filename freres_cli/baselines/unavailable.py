"""Published systems that are not here, as what they need cannot be had or is not written: for ``freres methods --all``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Unavailable:
    """A system that ``--method`` does not offer.

    ``name``: as it might be given to ``--method``. ``source``: the paper. ``reason``: why it is not here. ``needs``: what
    it would take. Both read on after a colon.
    """

    name: str
    source: str
    reason: str
    needs: str


# Facts are those of the papers' abstracts and public pages.
UNAVAILABLE: Mapping[str, Unavailable] = MappingProxyType(
    {
        system.name: system
        for system in (
            Unavailable(
                "grt",
                "GRT, arXiv 2509.14199",
                "it skips still patches before the tower sees them, so it does not start from latents; we found no weights",
                "a tower that encodes any subset of a frame's patches, and the authors' model",
            ),
            Unavailable(
                "tdc",
                "TDC, arXiv 2504.10443",
                "a trained query transformer sums up frames, sound and question; its weights fit the authors' model only",
                "the authors' checkpoint with its audio encoder, as a model family of its own",
            ),
            Unavailable(
                "vqtoken",
                "VQToken, arXiv 2503.16980",
                "its tokens are entries of a codebook, which only a language model trained on them can read",
                "the authors' checkpoint, as a model family of its own",
            ),
            Unavailable(
                "tempme",
                "TempMe, arXiv 2409.01156",
                "it merges tokens between the layers of a CLIP tower that is tuned to find videos by text; it answers no "
                "questions",
                "the authors' CLIP weights, and a measure of retrieval in place of answers",
            ),
            Unavailable(
                "tifre",
                "TiFRe, arXiv 2602.08861",
                "it picks frames with CLIP and with a second language model that rewrites the question; we found no code",
                "both towers of CLIP and that language model beside the one that answers",
            ),
            Unavailable(
                "dtem",
                "DTEM, arXiv 2412.10569",
                "it merges tokens between the tower's layers, by an embedding that is trained for each tower",
                "towers that merge between their layers, and that training for each of them",
            ),
            Unavailable(
                "evoprune",
                "EvoPrune, arXiv 2603.03681",
                "it prunes between the tower's layers, by the attention there; we found no code",
                "towers that drop tokens between their layers and give out their attention",
            ),
            Unavailable(
                "kffocus",
                "KFFocus, arXiv 2508.08989",
                "its condensers and its spatiotemporal module are trained with its own model; we found no code or weights",
                "the authors' checkpoint, as a model family of its own",
            ),
            Unavailable(
                "ppe",
                "PPE, arXiv 2510.22936",
                "it does not choose tokens: it gives a merged token several positions, each in its own channels of the "
                "rotary embedding",
                "several positions for each token, in bundles and in the rotary embedding of every family",
            ),
            Unavailable(
                "d-code",
                "D-CoDe, arXiv 2510.08818",
                "it picks frames with CLIP and has a second language model split the question; its merging of tokens alone "
                "would be another method",
                "CLIP and that language model beside the one that answers, and a prompt for each part of the question",
            ),
            Unavailable(
                "sparsevlm",
                "SparseVLM, arXiv 2410.04417",
                "it prunes at several layers of the decoder, by the attention of words that it picks from the question, "
                "and makes new tokens of those that it drops; here a decoder is pruned once, and tokens are only dropped",
                "pruning at several layers, with the attention of every word, and tokens that are made between layers",
            ),
        )
    }
)
