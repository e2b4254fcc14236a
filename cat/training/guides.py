"""The guides of a pre-training run: its recipe's section ``guides``, opened."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cat.config import ConfigError
from cat.data import Batch, Manifest
from cat.data.batch import one_thread
from cat.data.embeddings import EmbeddingError
from cat.data.guides import CachedRows, Guides, Reader
from cat.model import GuideConfig

if TYPE_CHECKING:  # else only for a run that has a live guide: they bring 200 modules along
    from cat.encoders.frozen import FrozenEncoder
    from cat.encoders.live import InEachProcess

_SAMPLED = 16  # numbers of a live encoder's embedding of noise that tell it from others
_TOLERANCE = 0.01  # of the largest of them: an encoder on a GPU rounds otherwise than on the CPU


class OpenGuides:
    """Widths, identities and readers of all guides.

    Raises: what `build_encoder` and `CachedRows` raise, with the guide's name.
    """

    def __init__(
        self, configs: Mapping[str, GuideConfig], manifest: Manifest, *, device: torch.device, precision: str
    ) -> None:
        self.configs = configs
        self.where = {name: _where(guide, device) for name, guide in configs.items() if guide.encoder}
        self.dims: dict[str, int] = {}
        self.identity: dict[str, dict[str, Any]] = {}
        self._in_workers: dict[str, InEachProcess] = {}
        self._here: dict[str, FrozenEncoder] = {}
        self._device = device
        self._dtype = torch.bfloat16 if device.type == "cuda" and precision == "bf16" else torch.float32
        cached: dict[str, Reader] = {}
        for name, guide in configs.items():
            try:
                if guide.embeddings:
                    cached[name] = rows = CachedRows(guide.embeddings, manifest)
                    self.dims[name], self.identity[name] = rows.store.dim, rows.identity
                else:
                    self._take_up(name, str(guide.encoder))
            except Exception as error:
                error.add_note(f"(of guides.{name})")
                raise
        self.train = self._readers(manifest, cached)
        self._listener: Callable[[Iterator[Batch], Manifest], Iterator[Batch]] | None = None

    def _take_up(self, name: str, spec: str) -> None:
        """What is known of a live encoder. One that works in the data workers is not kept here: each has its own."""
        from cat.encoders.build import build_encoder
        from cat.encoders.live import InEachProcess

        here = self.where[name] == "device"
        encoder = build_encoder(spec, device=self._device if here else "cpu")
        self.dims[name], self.identity[name] = encoder.dim, encoder_identity(encoder)
        if here:
            self._here[name] = encoder
        else:
            self._in_workers[name] = InEachProcess(spec)

    def _readers(self, manifest: Manifest, cached: Mapping[str, Reader]) -> Guides:
        if not self.where:
            return Guides(cached)
        from cat.encoders.live import LiveRows, Waves

        rows = {**cached, **{name: LiveRows(encoder, manifest) for name, encoder in self._in_workers.items()}}
        return Guides(rows, {name: Waves(encoder, manifest) for name, encoder in self._here.items()})

    def of_validation(self, manifest: Manifest) -> tuple[Guides, list[str]]:
        """The same for other clips, but for the cached ones that lack some of them; and notes that say which."""
        cached: dict[str, Reader] = {}
        notes = []
        for name, guide in self.configs.items():
            if guide.embeddings:
                try:
                    cached[name] = CachedRows(guide.embeddings, manifest)
                except EmbeddingError as error:
                    notes.append(f"validation goes without the L_r of guides.{name}: {str(error).partition(': ')[0]}")
        return self._readers(manifest, cached), notes

    def listen(self, batches: Iterator[Batch], manifest: Manifest) -> Iterator[Batch]:
        """Batches with the rows of all guides."""
        if not self._here:
            return batches
        if self._listener is None:
            from cat.encoders.live import Listener

            self._listener = Listener(self._here, self._device, self._dtype)
        return self._listener(batches, manifest)


def encoder_identity(encoder: FrozenEncoder) -> dict[str, Any]:
    """JSON-able: its name, width and rate, and some numbers of its embedding of a second of noise, which tell whether
    it is still the same network wherever its file lies."""
    samples = max(encoder.sample_rate, getattr(encoder, "min_samples", 1))
    noise = 0.1 * torch.randn(1, samples, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), one_thread():
        row = encoder(noise, torch.tensor([samples]))[0].cpu().double()
    if not row.isfinite().all():
        raise ValueError(f"{encoder.name} gave NaN or infinite values for noise; expected finite ones")
    places = torch.linspace(0, encoder.dim - 1, min(_SAMPLED, encoder.dim)).long()
    return {
        "encoder": encoder.name,
        "dim": encoder.dim,
        "sample_rate": encoder.sample_rate,
        "sample": [float(f"{value:.6g}") for value in row[places].tolist()],
    }


def check_same_guides(saved: Mapping[str, Any], now: Mapping[str, Any], run_dir: Path) -> None:
    """Whether a run may go on with these guides.

    Raises: `ConfigError` naming both of what differ.
    """
    for name, new in now.items():
        old = saved.get(name)
        if old is None or not _same(old, new):
            raise ConfigError(
                f"guides.{name} is {_told(new)}, and was {_told(old)} when {run_dir} was started: its numbers would "
                "change. Give that one, or start another run with run.name=OTHER"
            )


def _same(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Cached embeddings to the last bit; a live encoder by what it makes of noise, whatever it is called now."""
    if "sample_rate" not in old or "sample_rate" not in new:
        return dict(old) == dict(new)
    first, second = (torch.tensor(each["sample"], dtype=torch.float64) for each in (old, new))
    return all(old[key] == new[key] for key in ("dim", "sample_rate")) and bool(
        (first - second).abs().max() <= _TOLERANCE * first.abs().max()
    )


def _told(identity: Mapping[str, Any] | None) -> str:
    if identity is None:
        return "not there"
    told = f"{identity['encoder']} of width {identity['dim']}"
    if "sample_rate" not in identity:
        return f"{identity['count']} cached embeddings by {told} ({identity['sample'][:8]})"
    return (
        f"the live encoder {told} (which makes {', '.join(f'{v:.3g}' for v in identity['sample'][:3])}, ... of noise)"
    )


def _where(guide: GuideConfig, device: torch.device) -> str:
    if guide.where == "auto":
        return "device" if device.type == "cuda" else "worker"
    return guide.where
