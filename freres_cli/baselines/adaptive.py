"""Adaptive Fre-Res as an entry in the list of methods. Its code is in ``freres_cli/method``."""

from __future__ import annotations

from freres_cli.baselines.declaration import Method

METHOD = Method(
    name="adaptive",
    summary="each cell's time line cut where it changes, a token a stretch; calm or moving neighbours merged",
    source="ours, after Fre-Res (arXiv 2605.16366) and Ward (1963): a GoP for each cell, as long as it is calm",
    training="optional",
    streams=True,
    has_quality=True,
    deviations="of Fre-Res: no fixed GoPs and no coefficients; merging is greedy: see freres(7)",
)
