"""One group of pictures: an anchor frame and the frames it predicts, reduced when it closes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from freres_cli.method.dct import dct_basis
from freres_cli.method.residuals import ResidualTrajectory, cell_weights, pool_to_cells
from freres_cli.tracks import NUM_REPORTED_BANDS, NUM_SEGMENTS

SUMMARY_BLOCK = 1 << 18  # numbers in a block of ``SummaryStore``: 1 MiB


class SummaryStore:
    """What is left of GoPs that gave up their residuals, side by side in large blocks.

    Ours. Alone, each small tensor would lie between two large ones that are gone, and keep the heap from joining the room
    that they leave: a film with 2,700 cuts took 100 MB more than what it keeps.
    """

    def __init__(self) -> None:
        self._block, self._used = torch.zeros(0), 0
        self._empty: dict[str, Tensor] = {}

    def keep(self, tensor: Tensor) -> Tensor:
        """Return a copy of a float32 tensor, in a block."""
        start, self._used = self._used, self._used + tensor.numel()
        if self._used > self._block.numel():
            self._block = torch.zeros(max(SUMMARY_BLOCK, tensor.numel()))
            start, self._used = 0, tensor.numel()
        return self._block[start : self._used].view(tensor.shape).copy_(tensor)

    def empty(self, name: str, tensor: Tensor) -> Tensor:
        """Return ``tensor``, which has no numbers, as one for all GoPs that gave up the field ``name``."""
        if name not in self._empty:
            self._empty[name] = tensor.clone()  # the tensor itself keeps the numbers around it alive
        return self._empty[name]


@dataclass(eq=False)
class ClosedGop:
    """A reduced GoP, on the CPU: P cells, K candidate coefficients, C channels.

    ``anchor``: (H, W, C) as encoded, or ``None`` for an event whose anchor found no room. ``base``: (P, C) float32,
    pooled anchor. ``coefficients`` (K, P, C), ``energies`` (K, P) and ``segments`` (8, K, P), the inner product of
    residual and coefficient wave in each eighth, are float32 and empty if the GoP has no residual frames. Energies and
    inner products are weighted by ``cell_weights``.

    ``impulses`` (P, C) is the residual of each cell in the one bin, ``impulse_bins`` (P,), that the coefficients miss most;
    ``impulse_energies`` (P,) is the energy that they miss there. Empty if the coefficients miss nothing.
    """

    anchor_frame: int
    num_residuals: int
    num_bins: int
    bin_frames: int
    start: int
    event_distance: float
    residual_energy: float
    pooled_energy: float
    band_energy: Tensor
    segment_energy: Tensor
    anchor: Tensor | None
    base: Tensor
    coefficients: Tensor
    energies: Tensor
    segments: Tensor
    impulses: Tensor
    impulse_bins: Tensor
    impulse_energies: Tensor
    summary_base: Tensor
    summary_spectrum: Tensor

    def drop_anchor(self, start: int) -> None:
        """Give up the raw anchor of an event that found no room among the anchors. Its residual track stays."""
        self.start = start
        self.anchor = None

    def drop_residuals(self, store: SummaryStore) -> None:
        """Give up the residual track as well. Only the summary stays, in ``store``."""
        for name in ("coefficients", "energies", "base", "impulses", "impulse_bins", "impulse_energies"):
            setattr(self, name, store.empty(name, getattr(self, name)[:0]))
        self.segments = store.empty("segments", self.segments[:, :0])
        for name in ("summary_base", "summary_spectrum", "band_energy", "segment_energy"):
            setattr(self, name, store.keep(getattr(self, name)))


def segment_of_bin(num_bins: int) -> Tensor:
    """Return which eighth of the GoP each time bin belongs to: (num_bins,) int64."""
    return (torch.arange(num_bins) * NUM_SEGMENTS) // num_bins


def sum_by_segment(per_bin: Tensor) -> Tensor:
    """Return the sums of (num_bins, ...) over the bins of each eighth of the GoP: (8, ...) float32."""
    members = segment_of_bin(per_bin.shape[0]) == torch.arange(NUM_SEGMENTS)[:, None]
    return (members.to(torch.float32) @ per_bin.flatten(1)).reshape(NUM_SEGMENTS, *per_bin.shape[1:])


class OpenGop:
    """Collects the frames of one GoP. Memory does not grow with its length (see ``ResidualTrajectory``).

    ``anchor_frame``: index of the anchor frame in the clip. ``anchor``: its latents (H, W, C). ``width``: D, the main
    channels, which energies are computed over. ``pooled``: cells (rows, columns). ``start``: index into ``GOP_STARTS``.
    ``distance``: distance of the anchor frame to the frame before it.
    """

    def __init__(
        self,
        anchor_frame: int,
        anchor: Tensor,
        width: int,
        pooled: tuple[int, int],
        start: int,
        distance: float,
    ) -> None:
        self.anchor_frame = anchor_frame
        self.anchor = anchor
        self.start = start
        self.event_distance = distance
        self._width = width
        self._base = pool_to_cells(anchor, *pooled)
        self._weights = cell_weights(anchor.shape[0], anchor.shape[1], *pooled)
        self._trajectory = ResidualTrajectory()
        self._residual_energy = 0.0

    @property
    def num_residuals(self) -> int:
        return self._trajectory.num_frames

    def append(self, latents: Tensor, cells: Tensor) -> None:
        """Add a residual frame: its latents (H, W, C), and the same pooled to cells (P, C) float32."""
        residual = cells - self._base
        difference = latents[..., : self._width].to(torch.float32) - self.anchor[..., : self._width].to(torch.float32)
        self._residual_energy += float(difference.square().sum())
        per_cell = residual[..., : self._width].square().sum(-1)
        self._trajectory.append(residual, float((per_cell * self._weights.to(per_cell.device)).sum()))

    def close(self, num_coefficients: int) -> ClosedGop:
        """Return the reduced GoP with its first ``num_coefficients`` coefficients, or as many as it has time bins."""
        channels = self.anchor.shape[-1]
        cells = self._base.shape[0]
        k = min(num_coefficients, self._trajectory.num_bins())
        coefficients = torch.zeros(0, cells, channels)
        energies, segments = torch.zeros(0, cells), torch.zeros(NUM_SEGMENTS, 0, cells)
        band_energy, segment_energy = torch.zeros(NUM_REPORTED_BANDS), torch.zeros(NUM_SEGMENTS)
        pooled_energy = 0.0
        if k:
            coefficients, band_energy, segments = self._transform(k)
            energies = coefficients[..., : self._width].square().sum(-1) * self._weights
            bin_energy = self._trajectory.bin_energies()
            segment_energy = sum_by_segment(bin_energy[:, None]).squeeze(1)
            pooled_energy = float(bin_energy.sum())
        impulses, impulse_bins, impulse_energies = self._find_impulses(coefficients)
        weights = (self._weights / self._weights.sum())[:, None]
        base = self._base.cpu()
        return ClosedGop(
            anchor_frame=self.anchor_frame,
            num_residuals=self._trajectory.num_frames,
            num_bins=self._trajectory.num_bins(),
            bin_frames=self._trajectory.bin_frames,
            start=self.start,
            event_distance=self.event_distance,
            residual_energy=self._residual_energy,
            pooled_energy=pooled_energy,
            band_energy=band_energy,
            segment_energy=segment_energy,
            anchor=self.anchor.cpu(),
            base=base,
            coefficients=coefficients,
            energies=energies,
            segments=segments,
            impulses=impulses,
            impulse_bins=impulse_bins,
            impulse_energies=impulse_energies,
            summary_base=(base * weights).sum(0),
            summary_spectrum=(coefficients * weights).sum(1),
        )

    def _transform(self, num_coefficients: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return coefficients (K, P, C), energy of the first bands (8,), and segment inner products (8, K, P), on the
        CPU.

        A bin stands for ``bin_frames`` equal frames, so coefficients are scaled by the square root of that. Energies of
        GoPs of any length can then be compared.
        """
        bins = self._trajectory.bins()
        num_bins, root = bins.shape[0], self._trajectory.bin_frames**0.5
        reported = min(NUM_REPORTED_BANDS, num_bins)
        basis = dct_basis(num_bins, max(num_coefficients, reported), bins.device)
        spectrum = torch.einsum("kb,bpc->kpc", basis, bins) * root
        band_energy = torch.zeros(NUM_REPORTED_BANDS)
        band_energy[:reported] = spectrum[:reported, :, : self._width].square().sum(-1).cpu() @ self._weights
        coefficients = spectrum[:num_coefficients].clone()
        main = slice(0, self._width)
        inner = torch.einsum("bpc,kpc->bkp", bins[..., main], coefficients[..., main])
        inner = inner * (basis[:num_coefficients].T * root)[..., None]
        return coefficients.cpu(), band_energy, sum_by_segment(inner.cpu() * self._weights)

    def _find_impulses(self, coefficients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the residual (P, C) of each cell in the bin where ``coefficients`` (K, P, C) miss most, the bin and the
        energy missed, (P,) each, on the CPU; nothing if there is a coefficient for every bin."""
        num_bins, num_coefficients = self._trajectory.num_bins(), coefficients.shape[0]
        if num_coefficients == num_bins:
            return coefficients.new_zeros(0, coefficients.shape[2]), torch.zeros(0, dtype=torch.int64), torch.zeros(0)
        bins = self._trajectory.bins()
        waves = dct_basis(num_bins, num_coefficients, bins.device) / self._trajectory.bin_frames**0.5
        main = slice(0, self._width)
        missed = bins[..., main] - torch.einsum("kb,kpc->bpc", waves, coefficients[..., main].to(bins.device))
        energy, at = missed.square().sum(-1).max(0)
        cells = torch.arange(at.shape[0], device=at.device)
        return bins[at, cells].cpu(), at.cpu(), energy.cpu() * self._weights * self._trajectory.bin_frames
