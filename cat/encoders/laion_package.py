"""CLAP through LAION's own package, where it is installed: what `clap:PATH` can be checked against."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cat.encoders.frozen import checked_lengths, mean_direction
from cat.encoders.laion import architecture, audio_tower, read_laion

# The package's names of HTS-AT, by the width of its patches.
_TOWERS = {96: "HTSAT-tiny", 128: "HTSAT-base"}
_POSITIONS = "text_branch.embeddings.position_ids"


class LaionClapEncoder:
    """What ``get_audio_embedding_from_data`` of the package `laion-clap` gives: (B, 512) of unit length at 48 kHz.

    ``path`` is a file of LAION's own. Lengths, features, pooling, licence and source are `ClapEncoder`'s, which reads
    the same file without the package. The package takes clips that are longer than 10 s at random places, drawn from
    NumPy's global generator: it is set anew for each clip, and put back. Fused, today's torchvision squeezes such a
    clip with a filter against aliasing that torchvision had not when these networks were trained; `ClapEncoder` has it
    not either.

    The package fetches tokenizers and roberta-base from the Hugging Face hub for its text tower. It imports torchvision
    and torchaudio, of which the builds on PyPI need a torch for CUDA.

    Raises: ImportError that says what the package lacks, ValueError where the file does not fit.
    """

    combine = staticmethod(mean_direction)

    def __init__(self, path: str | Path, *, device: torch.device | str = "cpu") -> None:
        path = Path(path)
        state = read_laion(path)  # not by the package, which unpickles
        shape = architecture(path, audio_tower(path, state))
        if (tower := _TOWERS.get(shape["patch_embeds_hidden_size"])) is None:
            raise ValueError(
                f"laion-clap {str(path)!r} has patches {shape['patch_embeds_hidden_size']} wide; expected one of "
                + ", ".join(f"{width} ({name})" for width, name in _TOWERS.items())
            )
        with contextlib.redirect_stdout(sys.stderr):
            module = _package().CLAP_Module(enable_fusion=shape["enable_fusion"], device=str(device), amodel=tower)
        own = module.model.state_dict().keys()
        # Later releases of transformers do not save it.
        known = {name: tensor for name, tensor in state.items() if name != _POSITIONS or name in own}
        found = module.model.load_state_dict(known, strict=False)
        if wrong := [*found.missing_keys, *found.unexpected_keys]:
            raise ValueError(
                f"laion-clap {str(path)!r}: {len(wrong)} of {len(own)} tensors are missing or have no place (first: "
                f"{wrong[0]}); expected a file of LAION's for {tower}"
            )
        self.module = module.eval().requires_grad_(False)
        self.device = torch.device(device)
        self.name, self.sample_rate, self.dim = f"laion-clap:{path}", 48000, shape["projection_dim"]

    @torch.no_grad()
    def __call__(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        lengths_B = checked_lengths(waveform, lengths).tolist()
        clips = [clip[:n].float().cpu().numpy() for clip, n in zip(waveform, lengths_B, strict=True)]
        rows = []
        for clip in clips:  # one by one: of clips in a batch each would be cropped elsewhere
            with _fixed_numpy_seed(0):
                rows.append(self.module.get_audio_embedding_from_data([clip], use_tensor=False))
        return torch.from_numpy(np.concatenate(rows)).float()


def _package() -> Any:
    try:
        return importlib.import_module("laion_clap")
    except Exception as error:  # RuntimeError and OSError too, of torchvision and torchaudio beside another torch
        raise ImportError(
            "laion-clap:PATH needs the package 'laion-clap', which cannot be imported "
            f"({type(error).__name__}: {error}). It takes pip install laion-clap, and torchvision and torchaudio "
            "built for this torch: for a torch without CUDA from PyTorch's own index, as those on PyPI need CUDA's. "
            "clap:PATH reads the same files without it"
        ) from error


@contextlib.contextmanager
def _fixed_numpy_seed(seed: int) -> Iterator[None]:
    """The generator is the global one because that is the one the package draws from."""
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002
