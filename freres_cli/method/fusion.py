"""The trainable parts: adapters, type embeddings, gates and the absorber. Untrained, they change nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from freres_cli.method.absorber import (
    AMPLITUDE,
    NORMED,
    VALUES,
    SpatialGuidedAbsorber,
    neighbour_table,
    neighbours_of,
)
from freres_cli.records import TOKEN_KINDS
from freres_cli.tracks import Tracks

RAW_BRANCH, TEMPORAL_BRANCH = 0, 1
SMALLEST_UNIT = 1e-6  # of a token's channels; a clip of zeros has no unit
ANCHOR = TOKEN_KINDS.index("anchor")


@dataclass(frozen=True)
class ModuleShape:
    """Sizes of the trainable modules: ``width`` D, ``rank`` of all bottlenecks, ``num_bands`` known to the absorber.

    ``values``: what the absorber reads from a coefficient, one of ``absorber.VALUES``. Raises ``ValueError`` for another.
    """

    width: int
    rank: int
    num_bands: int
    values: str = AMPLITUDE

    def __post_init__(self) -> None:
        if self.values not in VALUES:
            raise ValueError(f"absorber values: expected {' or '.join(VALUES)}, got {self.values!r}")

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> ModuleShape:
        """Return the shape that an adapter records. Earlier releases had only normed values and did not say so."""
        return cls(**{"values": NORMED, **stored})

    def to_dict(self) -> dict[str, int | str]:
        return asdict(self)


class BottleneckAdapter(nn.Module):
    """Residual bottleneck MLP, ``x + up(gelu(down(norm(x))))`` with ``up`` zero at the start (paper E.1; the form
    is ours)."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.down = nn.Linear(width, rank)
        self.up = nn.Linear(rank, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        """Return ``x`` (n, D), corrected. ``source``: (n, D), what the correction is computed from; by default ``x``."""
        out: Tensor = x + self.up(nn.functional.gelu(self.down(self.norm(x if source is None else source))))
        return out


class FreResModules(nn.Module):
    """Everything that is trained on top of a frozen backbone (paper E.1). Works on the main channels, in float32, on
    the device it is on; tokens come from another and go back there."""

    def __init__(self, shape: ModuleShape) -> None:
        super().__init__()
        self.shape = shape
        self.adapters = nn.ModuleList(BottleneckAdapter(shape.width, shape.rank) for _ in TOKEN_KINDS)
        self.concat_down = nn.Linear(shape.width, shape.rank, bias=False)
        self.concat_up = nn.Linear(shape.rank, shape.width, bias=False)
        nn.init.zeros_(self.concat_up.weight)
        self.absorber = SpatialGuidedAbsorber(shape.width, shape.rank, shape.num_bands, shape.values)
        self.type_embedding = nn.Parameter(torch.zeros(len(TOKEN_KINDS), shape.width))
        self.gates = nn.Parameter(torch.ones(2))

    def adapt(self, latents: Tensor, kind: int, width: int, spectrum: Tensor | None) -> Tensor:
        """Return tokens of one kind, (n, C), after adapter, type embedding and branch gate.

        ``latents``: (n, C), of which the first ``width`` channels change. ``kind``: index into ``TOKEN_KINDS``.
        ``spectrum``: (n, D), mean retained coefficient, from which summary tokens are corrected (paper section 3.4);
        ``None`` for other kinds.
        """
        main = latents[:, :width].to(self.gates)
        adapted = self.adapters[kind](main, None if spectrum is None else spectrum.to(main)) + self.type_embedding[kind]
        gate = self.gates[RAW_BRANCH if kind == ANCHOR else TEMPORAL_BRANCH]
        return with_main(latents, adapted * gate)

    def adapt_concat(self, latents: Tensor, width: int) -> Tensor:
        """Return coefficients after a linear adapter, ``c + up(down(c))``: the ``concat`` variant (paper Table 4
        D)."""
        main = latents[:, :width].to(self.gates)
        return with_main(latents, main + self.concat_up(self.concat_down(main)))

    def absorb(self, latents: Tensor, tracks: Tracks, gop: Tensor, cell: Tensor) -> Tensor:
        """Return dynamic tokens ``latents`` (n, C) after the absorber; ``gop``, ``cell``: (n,), their place in ``tracks``."""
        return with_main(latents, self.absorber(*self.absorber_inputs(latents, tracks, gop, cell)))

    def absorber_inputs(
        self, latents: Tensor, tracks: Tracks, gop: Tensor, cell: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what the absorber takes: main channels of the tokens (n, D), coefficients (m, D), their scale (m,) and
        slots (n, 9, K), where the modules are.

        ``latents``, ``tracks``, ``gop``, ``cell``: as in ``absorb``. Raises ``ValueError`` if a band is beyond those the
        absorber knows.
        """
        # Impulses are tokens, but nothing to listen to: they are no waves.
        waves, num_bands = ~tracks.is_impulse, tracks.num_bands
        if num_bands > self.shape.num_bands:
            raise ValueError(f"coefficient band: expected at most {self.shape.num_bands - 1}, got {num_bands - 1}")
        table = neighbour_table(
            tracks.coefficient_gop[waves],
            tracks.coefficient_cell[waves],
            tracks.coefficient_band[waves],
            tracks.gop_anchor_frame.shape[0],
            tracks.pooled_grid,
            num_bands,
        )
        around = neighbours_of(cell, tracks.pooled_grid)
        slots = torch.where((around < 0)[..., None], -1, table[gop[:, None], around.clamp(min=0)])
        coefficients = tracks.coefficient_values[waves, : tracks.width].to(self.gates)
        scale = _amplitude_scale(tracks, tracks.coefficient_gop[waves]).to(self.gates)
        return latents[:, : tracks.width].to(self.gates), coefficients, scale, slots.to(self.gates.device)


def _amplitude_scale(tracks: Tracks, gop: Tensor) -> Tensor:
    """What turns coefficients of these GoPs, (m,), into amplitudes of their waves in units of a token: (m,) float32.

    A wave over n frames has amplitude c / sqrt(n). The unit is the root mean square of a channel of the clip's pooled
    anchors: one number for the clip, so that what moves little stays small beside what moves much.
    """
    num_frames = (tracks.gop_num_bins[gop] * tracks.gop_bin_frames[gop]).to(torch.float32)
    unit = tracks.base_latents[:, : tracks.width].to(torch.float32).square().mean().sqrt()
    return 1.0 / (unit.clamp(min=SMALLEST_UNIT) * num_frames.sqrt())


def with_main(latents: Tensor, main: Tensor) -> Tensor:
    """Replace the main channels and keep the DeepStack rows after them, in the dtype and on the device of ``latents``."""
    width = main.shape[1]
    if width == latents.shape[1]:
        return main.to(latents)
    return torch.cat([main.to(latents), latents[:, width:]], dim=1)
