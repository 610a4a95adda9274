"""Every compression method by name: read by ``--method``, ``--methods``, help, completion and ``freres methods``."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from freres_cli.baselines import (
    adaptive,
    aot,
    blind,
    dtd,
    evs,
    fastvid,
    flashvid,
    framefusion,
    fre_res,
    full,
    holitom,
    lowres,
    prumerge,
    prunevid,
    sttm,
    todre,
    uniform,
    visionzip,
)
from freres_cli.baselines.declaration import Method

FRE_RES, ADAPTIVE = fre_res.METHOD.name, adaptive.METHOD.name

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        method.name: method
        for method in (
            full.METHOD,
            uniform.METHOD,
            lowres.METHOD,
            evs.METHOD,
            dtd.METHOD,
            framefusion.METHOD,
            sttm.METHOD,
            prunevid.METHOD,
            flashvid.METHOD,
            aot.METHOD,
            todre.METHOD,
            fastvid.METHOD,
            visionzip.METHOD,
            holitom.METHOD,
            prumerge.METHOD,
            fre_res.METHOD,
            adaptive.METHOD,
            blind.METHOD,
        )
    }
)
BUNDLE_METHODS = tuple(name for name, method in METHODS.items() if method.makes_bundles)
