"""Every compression method by name: read by ``--method``, ``--methods``, help, completion and ``freres methods``. First
freres' own, then those of other packages."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from freres_cli.baselines import (
    adaptive,
    aot,
    apet,
    blind,
    cdpruner,
    divprune,
    dpp,
    dtd,
    dycoke,
    evs,
    fastv,
    fastvid,
    flashvid,
    fourier,
    fourier_raw,
    framefusion,
    framefusion_prune,
    fre_res,
    full,
    holitom,
    ktv,
    lowres,
    prumerge,
    prunevid,
    sttm,
    todre,
    tome,
    ts_llava,
    uniform,
    vidcom2,
    visionzip,
)
from freres_cli.baselines.declaration import Method
from freres_cli.baselines.plugins import find_plugins

FRE_RES, ADAPTIVE, BLIND = fre_res.METHOD.name, adaptive.METHOD.name, blind.METHOD.name

OWN_METHODS = {
    method.name: method
    for method in (
        full.METHOD,
        uniform.METHOD,
        lowres.METHOD,
        evs.METHOD,
        dtd.METHOD,
        aot.METHOD,
        apet.METHOD,
        divprune.METHOD,
        dpp.METHOD,
        dycoke.METHOD,
        fastvid.METHOD,
        flashvid.METHOD,
        fourier.METHOD,
        fourier_raw.METHOD,
        framefusion.METHOD,
        holitom.METHOD,
        ktv.METHOD,
        prumerge.METHOD,
        prunevid.METHOD,
        sttm.METHOD,
        todre.METHOD,
        tome.METHOD,
        ts_llava.METHOD,
        vidcom2.METHOD,
        visionzip.METHOD,
        cdpruner.METHOD,
        fastv.METHOD,
        framefusion_prune.METHOD,
        fre_res.METHOD,
        adaptive.METHOD,
        blind.METHOD,
    )
}
PLUGINS = find_plugins(OWN_METHODS)
METHODS: Mapping[str, Method] = MappingProxyType({**OWN_METHODS, **PLUGINS.methods})
OWN_BUNDLE_METHODS = tuple(name for name, method in OWN_METHODS.items() if method.makes_bundles)
BUNDLE_METHODS = tuple(name for name, method in METHODS.items() if method.makes_bundles)
