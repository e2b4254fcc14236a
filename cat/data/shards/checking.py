"""Whether every clip of a sharded data set has the bytes that were indexed."""

from __future__ import annotations

from collections.abc import Iterator

from cat.data.audio import AudioError, length_of
from cat.data.manifest import Manifest
from cat.data.shards.members import Member
from cat.data.text import ManifestError
from cat.data.workers import prefetched
from cat.progress import track

_CLIPS = 64  # read by a process at a time


def check_shards(manifest: Manifest, *, jobs: int = 1, progress: bool = False) -> Iterator[tuple[str, str]]:
    """What is wrong, and with which clip: of all bytes, and of the audio what its header tells.

    Raises: `ManifestError` for clips that are files; `cat.data.remote.RemoteError`.
    """
    if manifest.members is None:
        raise ManifestError(f"{manifest.name}: its clips lie in no shards; expected a folder with an index of shards")
    begins = range(0, len(manifest), _CLIPS)
    found = prefetched(_Checker(manifest), begins, num_workers=min(jobs, len(begins)) if jobs > 1 else 0)
    for failures in track(found, len(begins), label="check", unit=f"x {_CLIPS} clips", enabled=progress):
        yield from failures


class _Checker:
    """Item ``begin`` is what is wrong with the clips from that number on."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest

    def __getitem__(self, begin: int) -> list[tuple[str, str]]:
        failures = []
        for index in range(begin, min(begin + _CLIPS, len(self._manifest))):
            audio = self._manifest.audio(index)
            try:
                if isinstance(audio, Member):
                    length_of(audio)
            except AudioError as error:
                failures.append((error.path, error.reason))
        return failures
