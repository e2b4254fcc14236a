"""The guides of a pre-training run: its recipe's section ``guides``, opened."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from cat.data import Batch, Manifest
from cat.data.embeddings import EmbeddingError
from cat.data.guides import CachedRows, Guides, Reader
from cat.model import GuideConfig

if TYPE_CHECKING:  # else only for a run that has a live guide: they bring 200 modules along
    from cat.encoders.frozen import FrozenEncoder
    from cat.encoders.live import InEachProcess


class OpenGuides:
    """Widths, identities and readers of all guides, ``where`` their embeddings are made, and those that are ``cached``.

    Raises: what `build_encoder` and `CachedRows` raise, with the guide's name.
    """

    def __init__(
        self, configs: Mapping[str, GuideConfig], manifest: Manifest, *, device: torch.device, precision: str
    ) -> None:
        self.configs = configs
        self.where = {name: _where(guide, device) for name, guide in configs.items()}
        self.dims: dict[str, int] = {}
        self.identity: dict[str, dict[str, Any]] = {}
        self._in_workers: dict[str, InEachProcess] = {}
        self._here: dict[str, FrozenEncoder] = {}
        self._device = device
        self._dtype = torch.bfloat16 if device.type == "cuda" and precision == "bf16" else torch.float32
        self.cached: dict[str, CachedRows] = {}
        for name, guide in configs.items():
            try:
                if guide.embeddings:
                    self.cached[name] = rows = CachedRows(guide.embeddings, manifest)
                    self.dims[name], self.identity[name] = rows.store.dim, rows.identity
                else:
                    self._take_up(name, str(guide.encoder))
            except Exception as error:
                error.add_note(f"(of guides.{name})")
                raise
        self.train = self._readers(manifest, self.cached)
        self._listener: Callable[[Iterator[Batch], Manifest], Iterator[Batch]] | None = None

    def _take_up(self, name: str, spec: str) -> None:
        """What is known of a live encoder. One that works in the data workers is not kept here: each has its own."""
        from cat.encoders.build import build_encoder
        from cat.encoders.identity import identity_of
        from cat.encoders.live import InEachProcess

        here = self.where[name] == "device"
        encoder = build_encoder(spec, device=self._device if here else "cpu")
        self.dims[name] = encoder.dim
        self.identity[name] = {"encoder": encoder.name, "identity": identity_of(encoder), "dim": encoder.dim}
        if here:
            self._here[name] = encoder
        else:
            self._in_workers[name] = InEachProcess(spec)

    def _readers(self, manifest: Manifest, cached: Mapping[str, Reader]) -> Guides:
        if not self._in_workers and not self._here:
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


def _where(guide: GuideConfig, device: torch.device) -> str:
    if guide.embeddings:
        return "cached"
    if guide.where == "auto":
        return "device" if device.type == "cuda" else "worker"
    return guide.where
