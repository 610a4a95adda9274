"""FastV: after the second layer of the decoder, the tokens that the prompt's last token attends to most."""

from __future__ import annotations

from typing import TYPE_CHECKING

from freres_cli.baselines.declaration import Method
from freres_cli.baselines.evs import pick_highest

if TYPE_CHECKING:
    from torch import Tensor


def pick_attended_last(attention: Tensor, count: int) -> Tensor:
    """Return the indices of the min(``count``, S) tokens with the highest attention in the last of these layers, as the
    mean over its heads (FastV), (n,) int64, increasing. Of equal tokens, the first are kept.

    ``attention``: (k, heads, S), what the prompt's last token attends to in each layer.
    """
    return pick_highest(attention[-1].mean(dim=0), count)


METHOD = Method(
    name="fastv",
    summary="all tokens in the first 2 decoder layers, then those that the prompt's last token attends to most in layer 2",
    source="FastV, arXiv 2403.06764",
    needs=("question", "decoder layers"),
    makes_bundles=False,
    deviations="the budget is the number of tokens in the layers after the second; the first two see all of them; tokens "
    "are ranked by the attention of the prompt's last token, as in the authors' code, where the paper has the mean over all",
    pick_attended=pick_attended_last,
    num_full_layers=2,
)
