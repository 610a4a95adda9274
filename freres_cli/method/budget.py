"""Hierarchical allocation of a hard token budget (paper section 3.5 and appendix F.1)."""

from __future__ import annotations

from dataclasses import dataclass

# Ours: candidate coefficients for each dynamic token that the budget allows, so that ranking by energy has a choice. A
# value of 1 is the paper's own cap on K (F.1), which contradicts its compact case (K = 3 needs 384 candidates for 285).
CANDIDATES_PER_DYNAMIC_TOKEN = 4
# Ours: a smaller budget makes anchors thinner before it makes them fewer, as repacking does. What an anchor frame shows in
# few tokens is worth more than detail: GoPs stay short, so what is brief is near an anchor. Only an anchor with less than
# this share of its tokens is given up.
MIN_ANCHOR_SHARE = 0.2
# Ours: but no thin anchor is kept for a GoP of fewer frames, because there would be no trajectory to transform.
MIN_GOP_FRAMES = 3
# Ours: each shot whose anchor found no room gives one summary token, from at most this share of the temporal budget.
DEMOTED_SUMMARY_SHARE = 0.25


@dataclass(frozen=True)
class MethodSettings:
    """The settings of the method, under the names that presets use.

    ``variant``: one of ``presets.VARIANTS``. ``anchors``: number of uniform anchors at ``reference_budget_tokens``. A larger
    budget has more of them; a smaller one has thinner ones, then fewer. ``keep_per_block``: tokens kept of the 9 in each
    3x3 block. ``temporal_share``: least share of the budget for residual tokens. ``pooled_side``: g.
    ``max_coefficients``: K_max. ``tau``: event threshold, ``None`` for automatic.
    """

    variant: str
    reference_budget_tokens: int
    anchors: int
    keep_per_block: int
    temporal_share: float
    static_per_gop: int
    pooled_side: int
    max_coefficients: int
    tau: float | None
    events: bool


@dataclass(frozen=True)
class Allocation:
    """Number of tokens of each kind. The sum never exceeds the budget."""

    anchor: int
    dynamic: int
    static: int
    summary: int

    @property
    def total(self) -> int:
        return self.anchor + self.dynamic + self.static + self.summary


@dataclass(frozen=True)
class BudgetPlan:
    """Everything that is decided before a frame is encoded.

    ``anchor_target_tokens``: A*R, shared by uniform and event anchors. ``num_coefficients``: K. ``is_lossless``: the
    budget holds every token, so all are kept unchanged and no other tokens are made.
    """

    budget_tokens: int
    num_frames: int
    grid: tuple[int, int]
    pooled_grid: tuple[int, int]
    num_anchors: int
    max_events: int
    anchor_target_tokens: int
    num_coefficients: int
    expected: Allocation
    is_lossless: bool

    @property
    def num_tokens_per_frame(self) -> int:
        return self.grid[0] * self.grid[1]


def plan_budget(
    num_frames: int,
    grid: tuple[int, int],
    settings: MethodSettings,
    budget_tokens: int,
    residual_grid: tuple[int, int] | None = None,
) -> BudgetPlan:
    """Return the plan for a clip of ``num_frames`` frames of ``grid`` (H, W) tokens under ``budget_tokens``.

    ``settings``: the preset's. ``residual_grid``: that of residual frames, if it is smaller; their cells can be no finer.
    Raises ``ValueError`` if a count is below one.
    """
    if num_frames < 1 or min(grid) < 1 or budget_tokens < 1:
        raise ValueError(f"frames, grid and budget: expected at least 1, got {num_frames}, {grid}, {budget_tokens}")
    tokens = grid[0] * grid[1]
    finest = residual_grid or grid
    pooled = (min(settings.pooled_side, finest[0]), min(settings.pooled_side, finest[1]))
    if budget_tokens >= num_frames * tokens and settings.variant != "temporal":
        everything = Allocation(num_frames * tokens, 0, 0, 0)
        return BudgetPlan(
            budget_tokens, num_frames, grid, pooled, num_frames, 0, everything.anchor, 1, everything, True
        )
    num_anchors = _choose_num_anchors(num_frames, tokens, pooled, settings, budget_tokens)
    target = _anchor_target(num_anchors, tokens, settings, budget_tokens)
    num_coefficients = _choose_num_coefficients(num_anchors, num_frames, pooled, settings, budget_tokens, target)
    trajectories = min(num_anchors, num_frames - num_anchors)
    num_gops = num_anchors if settings.variant == "temporal" else trajectories
    expected = allocate_budget(
        budget_tokens,
        settings,
        anchor_target=target,
        anchor_available=num_anchors * tokens,
        num_gops=num_gops,
        num_demoted=0,
        static_available=trajectories * num_static_cells(pooled, settings),
        dynamic_available=_num_candidates(num_anchors, num_frames, pooled, num_coefficients, settings),
    )
    max_events = num_anchors if settings.events else 0
    return BudgetPlan(
        budget_tokens,
        num_frames,
        grid,
        pooled,
        num_anchors,
        max_events,
        target,
        num_coefficients,
        expected,
        False,
    )


def allocate_budget(
    budget_tokens: int,
    settings: MethodSettings,
    *,
    anchor_target: int,
    anchor_available: int,
    num_gops: int,
    num_demoted: int,
    static_available: int,
    dynamic_available: int,
) -> Allocation:
    """Return how many tokens of each kind to keep, given how many there are.

    ``budget_tokens`` go to anchors up to ``anchor_target``, then to summary and static tokens, then to dynamic ones (paper
    F.1). What is left goes to more anchor tokens, then to more summaries of demoted GoPs (ours). ``anchor_available``,
    ``static_available``, ``dynamic_available``: candidates of each kind. ``num_gops``: GoPs with residual frames;
    ``num_demoted``: GoPs of events whose anchor found no room. Each gives at most one summary. ``settings``: its variant
    leaves some kinds out.
    """
    variant = settings.variant
    anchor = 0 if variant == "temporal" else min(anchor_target, anchor_available, budget_tokens)
    left = budget_tokens - anchor
    summary = static = dynamic = 0
    if variant != "anchors":
        summary = min(left, num_gops)
        summary += min(num_demoted, int((left - summary) * DEMOTED_SUMMARY_SHARE))
        static = min(left - summary, static_available)
        dynamic = min(left - summary - static, dynamic_available)
        left -= summary + static + dynamic
    if variant != "temporal":
        extra = min(left, anchor_available - anchor)
        anchor, left = anchor + extra, left - extra
    if variant != "anchors":
        summary += min(left, max(0, num_gops + num_demoted - summary))
    return Allocation(anchor, dynamic, static, summary)


def _anchor_target(num_anchors: int, tokens: int, settings: MethodSettings, budget_tokens: int) -> int:
    """A*R: the preset's share of every block, without cutting into the temporal share."""
    if settings.variant == "temporal":
        return 0
    if settings.variant == "anchors":
        return min(budget_tokens, num_anchors * tokens)
    per_anchor = max(1, (tokens * settings.keep_per_block) // 9)
    room = max(1, int(budget_tokens * (1.0 - settings.temporal_share)))
    return min(num_anchors * per_anchor, room)


def _choose_num_anchors(
    num_frames: int, tokens: int, pooled: tuple[int, int], settings: MethodSettings, budget_tokens: int
) -> int:
    """Scale the preset's anchors up to the budget, drop those that would be too thin, add more until the budget is used."""
    scaled = round(settings.anchors * budget_tokens / settings.reference_budget_tokens)
    num_anchors = min(num_frames, max(1, scaled, min(settings.anchors, num_frames // MIN_GOP_FRAMES)))
    if settings.variant == "temporal":
        return min(num_anchors, max(1, num_frames // 2))
    thinnest = max(1, int(tokens * MIN_ANCHOR_SHARE))
    target = _anchor_target(num_anchors, tokens, settings, budget_tokens)
    num_anchors = max(1, min(num_anchors, target // thinnest))
    while num_anchors < num_frames:
        target = _anchor_target(num_anchors, tokens, settings, budget_tokens)
        k = _choose_num_coefficients(num_anchors, num_frames, pooled, settings, budget_tokens, target)
        room = num_anchors * tokens
        if settings.variant != "anchors":
            room += min(num_anchors, num_frames - num_anchors) * (1 + num_static_cells(pooled, settings))
            room += _num_candidates(num_anchors, num_frames, pooled, k, settings)
        if room >= budget_tokens:
            break
        num_anchors += 1
    return num_anchors


def _choose_num_coefficients(
    num_anchors: int,
    num_frames: int,
    pooled: tuple[int, int],
    settings: MethodSettings,
    budget_tokens: int,
    anchor_target: int,
) -> int:
    """K = min(K_max, L, c * B_temporal / (G * P)), at least 1 (paper F.1; c is ours, see above).

    Below the preset's own budget, B_temporal is what it would be there: a smaller budget ranks the same candidates, as
    repacking does (ours).
    """
    scale = max(1.0, settings.reference_budget_tokens / budget_tokens)
    temporal_tokens = int((budget_tokens - anchor_target) * scale)
    reserved = num_anchors * (1 + settings.static_per_gop)
    candidates = CANDIDATES_PER_DYNAMIC_TOKEN * max(0, temporal_tokens - reserved)
    longest = max(1, -(-num_frames // num_anchors) - 1)
    affordable = candidates // (num_anchors * pooled[0] * pooled[1])
    return max(1, min(settings.max_coefficients, longest, affordable))


def num_static_cells(pooled: tuple[int, int], settings: MethodSettings) -> int:
    """Return the number of static tokens of a GoP: the preset's, but at most half of its cells."""
    return min(settings.static_per_gop, pooled[0] * pooled[1] // 2)


def _num_candidates(
    num_anchors: int, num_frames: int, pooled: tuple[int, int], num_coefficients: int, settings: MethodSettings
) -> int:
    """Coefficients and impulses that uniform GoPs offer: a GoP of L residual frames has at most L in each moving cell."""
    short, num_longer = divmod(num_frames, num_anchors)
    if settings.variant != "idct":
        num_coefficients += 1
    cells = pooled[0] * pooled[1] - num_static_cells(pooled, settings)
    per_cell = num_longer * min(num_coefficients, short) + (num_anchors - num_longer) * min(num_coefficients, short - 1)
    return cells * per_cell
