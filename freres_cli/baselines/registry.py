"""Every compression method by name: read by ``--method``, ``--methods``, help, completion and ``freres methods``."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from freres_cli.baselines import (
    adaptive,
    apet,
    blind,
    cdpruner,
    divprune,
    dpp,
    dtd,
    dycoke,
    evs,
    fastv,
    fourier,
    fourier_raw,
    framefusion_prune,
    fre_res,
    full,
    ktv,
    lowres,
    tome,
    ts_llava,
    uniform,
    vidcom2,
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
            vidcom2.METHOD,
            dycoke.METHOD,
            divprune.METHOD,
            apet.METHOD,
            tome.METHOD,
            fourier.METHOD,
            fourier_raw.METHOD,
            ts_llava.METHOD,
            ktv.METHOD,
            dpp.METHOD,
            cdpruner.METHOD,
            fastv.METHOD,
            framefusion_prune.METHOD,
            fre_res.METHOD,
            adaptive.METHOD,
            blind.METHOD,
        )
    }
)
BUNDLE_METHODS = tuple(name for name, method in METHODS.items() if method.makes_bundles)
