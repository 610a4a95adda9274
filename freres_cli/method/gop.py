"""One group of pictures: an anchor frame and the frames it predicts, reduced when it closes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from freres_cli.method.dct import dct_basis
from freres_cli.method.residuals import ResidualTrajectory, cell_weights, pool_to_cells
from freres_cli.tracks import NUM_REPORTED_BANDS, NUM_SEGMENTS

SUMMARY_BLOCK = 1 << 18  # numbers in a block of ``SummaryStore``: 1 MiB in float32


class SummaryStore:
    """What is left of GoPs that gave up their residuals, side by side in large blocks.

    Ours. Alone, each small tensor would lie between two large ones that are gone, and keep the heap from joining the room
    that they leave: a film with 2,700 cuts took over 100 MB more than what it keeps.
    """

    def __init__(self) -> None:
        self._blocks: dict[str, Tensor] = {}  # the open one of each dtype
        self._used: dict[str, int] = {}
        self._empty: dict[str, Tensor] = {}

    def keep(self, name: str, tensor: Tensor) -> Tensor:
        """Return a copy of the field ``name`` of a GoP, on the CPU. All that are empty are one tensor."""
        size = tensor.numel()
        if not size:
            return self._empty.setdefault(name, tensor)
        dtype = str(tensor.dtype)
        start = self._used.get(dtype, 0)
        if dtype not in self._blocks or start + size > self._blocks[dtype].numel():
            self._blocks[dtype], start = torch.zeros(max(SUMMARY_BLOCK, size), dtype=tensor.dtype), 0
        self._used[dtype] = start + size
        return self._blocks[dtype][start : start + size].view(tensor.shape).copy_(tensor)


@dataclass(eq=False)
class ClosedGop:
    """A reduced GoP, on the device of its latents until it is fetched: P cells, K candidate coefficients, C channels.

    ``anchor``: (H, W, C) as encoded, or ``None`` for an event whose anchor found no room. ``base``: (P, C), pooled anchor.
    ``means``: (P, C), of each cell over the residual frames. ``coefficients`` (K, P, C), ``energies`` (K, P) and
    ``segments`` (8, K, P), the inner product of residual and coefficient wave in each eighth, are empty if the GoP has no
    residual frames. Energies and inner products are float32, and weighted by ``cell_weights``; latents and coefficients
    have the dtype of the anchor, as the tracks do.

    ``impulses`` (P, C) is the residual of each cell in the one bin, ``impulse_bins`` (P,), that the coefficients miss most;
    ``impulse_energies`` (P,) is the energy that they miss there. Empty if the coefficients miss nothing.
    """

    anchor_frame: int
    num_residuals: int
    num_bins: int
    bin_frames: int
    start: int
    event_distance: float
    residual_energy: Tensor
    pooled_energy: Tensor
    band_energy: Tensor
    segment_energy: Tensor
    anchor: Tensor | None
    base: Tensor
    means: Tensor
    coefficients: Tensor
    energies: Tensor
    segments: Tensor
    impulses: Tensor
    impulse_bins: Tensor
    impulse_energies: Tensor
    summary_base: Tensor
    summary_spectrum: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Return its tensors by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def drop_anchor(self, start: int) -> None:
        """Give up the raw anchor of an event that found no room among the anchors. Its residual track stays."""
        self.start = start
        self.anchor = None

    def drop_residuals(self) -> None:
        """Give up the residual track as well. Only the summary stays."""
        # Copies: an empty view would keep the whole storage alive.
        self.coefficients, self.energies = self.coefficients[:0].clone(), self.energies[:0].clone()
        self.segments, self.base = self.segments[:, :0].clone(), self.base[:0].clone()
        self.means = self.means[:0].clone()
        self.impulses, self.impulse_bins = self.impulses[:0].clone(), self.impulse_bins[:0].clone()
        self.impulse_energies = self.impulse_energies[:0].clone()

    def move_to(self, store: SummaryStore) -> None:
        """Keep what is left in ``store``."""
        for name, tensor in self.tensors().items():
            setattr(self, name, store.keep(name, tensor))


def segment_of_bin(num_bins: int) -> Tensor:
    """Return which eighth of the GoP each time bin belongs to: (num_bins,) int64."""
    return (torch.arange(num_bins) * NUM_SEGMENTS) // num_bins


def sum_by_segment(per_bin: Tensor) -> Tensor:
    """Return the sums of (num_bins, ...) over the bins of each eighth of the GoP: (8, ...) float32."""
    members = segment_of_bin(per_bin.shape[0]) == torch.arange(NUM_SEGMENTS)[:, None]
    return (members.to(per_bin) @ per_bin.flatten(1)).reshape(NUM_SEGMENTS, *per_bin.shape[1:])


class OpenGop:
    """Collects the frames of one GoP. Memory does not grow with its length (see ``ResidualTrajectory``).

    ``anchor_frame``: index of the anchor frame in the clip. ``anchor``: its latents (H, W, C). ``width``: D, the main
    channels, which energies are computed over. ``pooled``: cells (rows, columns). ``start``: index into ``GOP_STARTS``.
    ``distance``: distance of the anchor frame to the frame before it. ``reference``: the anchor frame as residual frames
    are given, its latents (h, w, C) and cells (P, C), which residuals are taken from. With two resolutions that is not
    ``anchor``.
    """

    def __init__(
        self,
        anchor_frame: int,
        anchor: Tensor,
        width: int,
        pooled: tuple[int, int],
        start: int,
        distance: float,
        reference: tuple[Tensor, Tensor],
    ) -> None:
        self.anchor_frame = anchor_frame
        self.anchor = anchor
        self.start = start
        self.event_distance = distance
        self._width = width
        self._base = pool_to_cells(anchor, *pooled)
        self._reference, self._reference_cells = reference
        self._weights = cell_weights(anchor.shape[0], anchor.shape[1], *pooled).to(anchor.device)
        # As if each token of a smaller grid stood for as many of the anchor's.
        self._share = anchor[..., 0].numel() / reference[0][..., 0].numel()
        self._trajectory = ResidualTrajectory()
        self._residual_energy = self._base.new_zeros(1, dtype=torch.float64)

    @property
    def num_residuals(self) -> int:
        return self._trajectory.num_frames

    def append(self, latents: Tensor, cells: Tensor) -> None:
        """Add residual frames: their latents (n, h, w, C), and the same pooled to cells (n, P, C) float32."""
        main = slice(0, self._width)
        difference = latents[..., main].to(torch.float32) - self._reference[..., main].to(torch.float32)
        # Over the channels first: the order of the additions does not depend on the number of frames.
        energies = _sum_after_first(difference.square().sum(-1)).to(torch.float64)
        self._residual_energy = torch.cat([self._residual_energy, energies]).cumsum(0)[-1:].clone()
        residuals = cells - self._reference_cells
        per_cell = residuals[..., main].square().sum(-1) * self._weights
        for residual, energy in zip(residuals, _sum_after_first(per_cell).to(torch.float64), strict=True):
            self._trajectory.append(residual, energy)

    def close(self, num_coefficients: int) -> ClosedGop:
        """Return the reduced GoP with its first ``num_coefficients`` coefficients, or as many as it has time bins."""
        cells, channels = self._base.shape
        new = self._base.new_zeros  # float32, on the device
        k = min(num_coefficients, self._trajectory.num_bins())
        coefficients, means = new(0, cells, channels), new(0, channels)
        energies, segments = new(0, cells), new(NUM_SEGMENTS, 0, cells)
        band_energy, segment_energy = new(NUM_REPORTED_BANDS), new(NUM_SEGMENTS)
        pooled_energy = new(())
        if k:
            coefficients, band_energy, segments = self._transform(k)
            energies = coefficients[..., : self._width].square().sum(-1) * self._weights
            bin_energy = self._trajectory.bin_energies()
            segment_energy = sum_by_segment(bin_energy[:, None]).squeeze(1)
            pooled_energy = bin_energy.sum()
            num_samples = self._trajectory.num_bins() * self._trajectory.bin_frames
            means = self._base + coefficients[0] / num_samples**0.5
            if num_samples != self._trajectory.num_frames:  # of the last bin there is less than the coefficients count
                counts = self._trajectory.bin_counts().to(means.device)[:, None, None]
                means = self._base + (self._trajectory.bins() * counts).sum(0) / self._trajectory.num_frames
        impulses, impulse_bins, impulse_energies = self._find_impulses(coefficients)
        weights = (self._weights / self._weights.sum())[:, None]
        dtype = self.anchor.dtype
        return ClosedGop(
            anchor_frame=self.anchor_frame,
            num_residuals=self._trajectory.num_frames,
            num_bins=self._trajectory.num_bins(),
            bin_frames=self._trajectory.bin_frames,
            start=self.start,
            event_distance=self.event_distance,
            residual_energy=self._share * self._residual_energy[0],
            pooled_energy=pooled_energy,
            band_energy=band_energy,
            segment_energy=segment_energy,
            anchor=self.anchor,
            base=self._base.to(dtype),
            means=means.to(dtype),
            coefficients=coefficients.to(dtype),
            energies=energies,
            segments=segments,
            impulses=impulses.to(dtype),
            impulse_bins=impulse_bins,
            impulse_energies=impulse_energies,
            summary_base=(self._base * weights).sum(0).to(dtype),
            summary_spectrum=(coefficients * weights).sum(1).to(dtype),
        )

    def _transform(self, num_coefficients: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return coefficients (K, P, C), energy of the first bands (8,), and segment inner products (8, K, P).

        A bin stands for ``bin_frames`` equal frames, so coefficients are scaled by the square root of that. Energies of
        GoPs of any length can then be compared.
        """
        bins = self._trajectory.bins()
        num_bins, root = bins.shape[0], self._trajectory.bin_frames**0.5
        reported = min(NUM_REPORTED_BANDS, num_bins)
        basis = dct_basis(num_bins, max(num_coefficients, reported), bins.device)
        spectrum = torch.einsum("kb,bpc->kpc", basis, bins) * root
        band_energy = bins.new_zeros(NUM_REPORTED_BANDS)
        band_energy[:reported] = spectrum[:reported, :, : self._width].square().sum(-1) @ self._weights
        coefficients = spectrum[:num_coefficients].clone()
        main = slice(0, self._width)
        inner = torch.einsum("bpc,kpc->bkp", bins[..., main], coefficients[..., main])
        counts = self._trajectory.bin_counts().to(bins.device) / self._trajectory.bin_frames
        inner = inner * (basis[:num_coefficients].T * root * counts[:, None])[..., None]
        return coefficients, band_energy, sum_by_segment(inner * self._weights)

    def _find_impulses(self, coefficients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the residual (P, C) of each cell in the bin where ``coefficients`` (K, P, C) miss most, the bin and the
        energy missed, (P,) each; nothing if there is a coefficient for every bin."""
        num_bins, num_coefficients = self._trajectory.num_bins(), coefficients.shape[0]
        new = coefficients.new_zeros
        if num_coefficients == num_bins:
            return new(0, coefficients.shape[2]), new(0, dtype=torch.int64), new(0)
        bins = self._trajectory.bins()
        waves = dct_basis(num_bins, num_coefficients, bins.device) / self._trajectory.bin_frames**0.5
        main = slice(0, self._width)
        missed = bins[..., main] - torch.einsum("kb,kpc->bpc", waves, coefficients[..., main])
        counts = self._trajectory.bin_counts().to(bins.device)
        energy, at = (missed.square().sum(-1) * counts[:, None]).max(0)
        cells = torch.arange(at.shape[0], device=at.device)
        return bins[at, cells], at, energy * self._weights


def _sum_after_first(values: Tensor) -> Tensor:
    """(n, ...) -> (n,)"""
    return values.flatten(1).sum(1)


def fetch(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return ``tensors``, all on one device, on the CPU: all of them in a single copy, so that it waits only once."""
    if not tensors or tensors[0].device.type == "cpu":
        return list(tensors)
    # Wide numbers first, so that each lies at a multiple of its size.
    order = sorted(range(len(tensors)), key=lambda i: -tensors[i].element_size())
    packed = torch.cat([tensors[i].reshape(-1).view(torch.uint8) for i in order]).cpu()
    fetched = list(tensors)
    for i, part in zip(order, packed.split([tensors[i].nbytes for i in order]), strict=True):
        # A view would keep all of them in memory.
        fetched[i] = part.view(tensors[i].dtype).reshape(tensors[i].shape).clone()
    return fetched
