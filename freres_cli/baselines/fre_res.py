"""Fre-Res as an entry in the list of methods. Its code is in ``freres_cli/method``."""

from __future__ import annotations

from freres_cli.baselines.declaration import Method

METHOD = Method(
    name="fre-res",
    summary="sparse full-detail anchor frames, and a few temporal DCT coefficients of the residuals between them",
    source="Fre-Res, arXiv 2605.16366",
    training="optional",
    streams=True,
    deviations="event-aware anchors; coefficients and impulses ranked over the whole clip; tokens at instants: see freres(7)",
)
