"""What a compression method declares. To add one to freres, write a file beside this one and list it in ``registry.py``.
Another package offers one by an entry point, see ``plugins.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from freres_cli.records import VideoTokens

    PickForQuestion = Callable[[Tensor, Tensor, int], Tensor]
    PickAttended = Callable[[Tensor, int], Tensor]

# What a method may need besides the latents.
NEEDS = ("question", "decoder layers")
TRAININGS = ("none", "optional", "required")
# The fields of a method that are functions: it has one of them, or works frame by frame.
FUNCTIONS = ("compress", "pick_for_question", "pick_attended")


@dataclass(frozen=True)
class Method:
    """A way to turn the latents of a clip into visual tokens.

    ``name``: as given to ``--method``. ``summary``: one line for lists. ``source``: the paper, or why it is ours.
    ``training``: one of ``TRAININGS``. ``needs``: any of ``NEEDS``; a method that needs the question cannot make
    bundles. ``streams``: memory grows with the tokens kept, not with the frames. ``has_budget``: the budget decides how
    many tokens are kept. ``has_quality``: a share of the latents' energy may decide it. ``makes_bundles``: ``freres
    compress`` accepts it. ``mixes``: a token may be a mixture of several latents, such as their mean, and a bundle does not
    name them. ``deviations``: how it differs from its source.

    ``compress``: (latents (T, H, W, C), frame_seconds (T,) float64, budget_tokens, width D) -> ``VideoTokens`` of the whole
    grid, on the CPU: at most B of them, their latents in the dtype given, by time, then row, then column. No two are at one
    place, unless the method ``mixes``. The same latents always give the same tokens. ``None`` for
    Fre-Res and adaptive Fre-Res, which take frames one at a time (``method/compress.py``, ``method/adaptive.py``), and for
    methods that need the question. Those have one of two functions, both of which return the indices of the tokens to
    keep, (n,) int64, increasing. ``pick_for_question``: (tokens (S, D), the question's embeddings (Q, D), n), before the
    decoder. ``pick_attended``: (attention (k, heads, S), n), after the first k = ``num_full_layers`` layers of the decoder:
    what the prompt's last token attends to in each of them.
    """

    name: str
    summary: str
    source: str
    training: str = "none"
    needs: tuple[str, ...] = ()
    streams: bool = False
    has_budget: bool = True
    has_quality: bool = False
    makes_bundles: bool = True
    mixes: bool = False
    deviations: str = "none"
    compress: Callable[[Tensor, Tensor, int, int], VideoTokens] | None = None
    pick_for_question: PickForQuestion | None = None
    pick_attended: PickAttended | None = None
    num_full_layers: int = 0

    def __post_init__(self) -> None:
        if self.makes_bundles and not self.is_question_blind:
            raise ValueError(f"{self.name}: a bundle is made before any question is known")
        if self.makes_bundles and (self.compress is None) != self.streams:
            raise ValueError(f"{self.name}: expected a function compress, or a method of freres that streams")

    @property
    def is_question_blind(self) -> bool:
        """Whether its tokens are the same for every question."""
        return "question" not in self.needs


class _LazyModule(ModuleType):
    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self.__name__), name)


def lazy_module(name: str) -> Any:
    """Return a stand-in that imports the module on first use: help, completion and lists read every declaration, and
    torch takes a second to import."""
    return _LazyModule(name)
