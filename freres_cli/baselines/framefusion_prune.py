"""The pruning of FrameFusion: after some layers of the decoder, the tokens that were attended to most in all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from freres_cli.baselines.declaration import Method
from freres_cli.baselines.evs import pick_highest

if TYPE_CHECKING:
    from torch import Tensor


def pick_attended_in_all(attention: Tensor, count: int) -> Tensor:
    """Return the indices of the min(``count``, S) tokens with the highest attention, summed over these layers, as the
    mean over heads (FrameFusion's importance), (n,) int64, increasing. Of equal tokens, the first are kept.

    ``attention``: (k, heads, S), what the prompt's last token attends to in each layer.
    """
    return pick_highest(attention.mean(dim=1).sum(dim=0), count)


METHOD = Method(
    name="framefusion-prune",
    summary="all tokens in the first 3 decoder layers, then those that the prompt's last token attended to most in them",
    source="FrameFusion, arXiv 2501.01986, its pruning",
    needs=("question", "decoder layers"),
    makes_bundles=False,
    deviations="without its merging of similar tokens; pruned after the third layer, where the original prunes once "
    "merging has ended, and by the attention of three layers, where its code takes that of one; the budget is "
    "the number of tokens in the layers after that, and the first three see all of them",
    pick_attended=pick_attended_in_all,
    num_full_layers=3,
)
