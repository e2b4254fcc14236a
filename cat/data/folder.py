"""A folder as a data set: which files are clips, what is left out, and no way to go round in circles."""

from __future__ import annotations

import errno
import heapq
import os
import stat
from collections import Counter
from pathlib import Path

from cat.data.clips import Clip, Clips
from cat.data.text import ManifestError, label_text

# What libsndfile reads and nobody uses for something else (as .mat and .iff are).
AUDIO_SUFFIXES = (
    *(".wav", ".wave", ".bwf", ".rf64", ".w64", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc"),
    *(".caf", ".au", ".snd", ".voc", ".sph", ".nist", ".paf", ".svx", ".8svx", ".avr", ".ircam", ".wve"),
    ".pvf",
)
_OF_THE_SYSTEM = ("lost+found", "System Volume Information", "$RECYCLE.BIN", "__MACOSX")  # as hidden as a dot makes it


def find_clips(root: Path) -> tuple[Clips, tuple[str, ...]]:
    """The audio files below `root`, sorted by path, and notes on what is left out.

    Raises ManifestError for a folder that cannot be listed: what lies in it would be missing without a word.
    """
    walk = _Walk(root)
    walk.below("", os.path.realpath(root))
    while walk.folder_links:  # after all real folders, so that a folder goes by its own name, not by a link's
        walk.follow(*heapq.heappop(walk.folder_links))
    found = sorted([*walk.files, *walk.linked_files()])
    labels = {name: label_text(name, f"{root}/{name}") for name in {p.split("/")[0] for p in found if "/" in p}}
    clips = Clips(Clip(path, labels=(labels[path.split("/")[0]],) if "/" in path else ()) for path in found)
    return clips, tuple(walk.notes(found))


class _Walk:
    """Walks every real folder once, however many links lead there; `os.walk` follows links in circles, for ever."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files: list[str] = []  # below root
        self.folder_links: list[tuple[str, str]] = []  # a heap of (link below root, real folder that the link lies in)
        self._file_links: list[str] = []
        self._walked: set[tuple[int, int]] = set()  # (device, inode) of folders
        self._real: dict[str, str] = {}  # folder below root -> where it really is
        self._left_out: Counter[str] = Counter()
        self._repeated: list[str] = []

    def below(self, folder: str, real: str) -> None:
        """Walk a folder and its real subfolders."""
        waiting = [(folder, real)]
        while waiting:
            folder, real = waiting.pop()
            try:
                identity = _identity(self.root / folder)
                with os.scandir(self.root / folder) as entries:
                    found = sorted(entries, key=lambda entry: entry.name)
            except OSError as error:
                raise self._unreadable(folder, error) from None
            if identity in self._walked:
                self._repeated.append(folder)
                continue
            self._walked.add(identity)
            self._real[folder] = real
            for entry in found:
                path = f"{folder}/{entry.name}" if folder else entry.name
                if self._sort(entry, path, real):
                    waiting.append((path, os.path.join(real, entry.name)))

    def _sort(self, entry: os.DirEntry[str], path: str, beside: str) -> bool:
        """Puts an entry where it belongs; True for a folder, which is to be walked."""
        is_folder = entry.is_dir(follow_symlinks=False)
        if is_hidden(entry.name):
            self._left_out["hidden folder" if is_folder else "hidden file"] += 1
        elif is_folder:
            return True
        elif entry.is_symlink() and self._leads_to_folder(path):
            heapq.heappush(self.folder_links, (path, beside))
        elif entry.name.lower().endswith(AUDIO_SUFFIXES):
            (self._file_links if entry.is_symlink() else self.files).append(path)
        else:
            self._left_out[f"{os.path.splitext(entry.name)[1].lower() or 'suffixless'} file"] += 1
        return False

    def follow(self, link: str, beside: str) -> None:
        """Walk where a link leads, unless that is walked already or the link lies in it."""
        target = os.path.realpath(self.root / link)
        around = any(_contains(target, place) for place in (beside, self._real[""]))
        if around or _identity(target) in self._walked:
            self._repeated.append(link)
        else:
            self.below(link, target)

    def linked_files(self) -> list[str]:
        """The links to files, but one to each file, and none to a file that is here under its own name."""
        if not self._file_links:
            return []
        known = {os.path.join(self._real[os.path.dirname(p)], os.path.basename(p)) for p in self.files}
        kept: list[str] = []
        for path in sorted(self._file_links):
            target = os.path.realpath(self.root / path)
            (self._repeated if target in known else kept).append(path)
            known.add(target)
        return kept

    def notes(self, found: list[str]) -> list[str]:
        notes = []
        if self._left_out:
            kinds = sorted(self._left_out.items(), key=lambda item: (-item[1], item[0]))
            some = [_count(number, kind) for kind, number in kinds[:8]]
            some += [f"and {len(kinds) - 8} kinds more"] if len(kinds) > 8 else []
            notes.append(f"{self.root}: left out: {', '.join(some)}; a manifest may name files of any suffix")
        if self._repeated:
            number = _count(len(self._repeated), "link")
            notes.append(f"{self.root}: left out: {number} to what is in it already, e.g. {min(self._repeated)}")
        stray = [path for path in found if "/" not in path]
        if stray and len(stray) < len(found):
            notes.append(
                f"{self.root}: {len(stray)} of {len(found)} clips lie in no subfolder and so have no label, "
                f"e.g. {stray[0]}"
            )
        return notes

    def _leads_to_folder(self, path: str) -> bool:
        try:
            return stat.S_ISDIR(os.stat(self.root / path).st_mode)
        except OSError as error:
            nowhere = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
            if nowhere or path.lower().endswith(AUDIO_SUFFIXES):  # a clip that cannot be read is recorded as such
                return False
            raise self._unreadable(path, error) from None

    def _unreadable(self, path: str, error: OSError) -> ManifestError:
        return ManifestError(
            f"{self.root / path}: this folder cannot be listed ({error.strerror}), and what is in it would be missing; "
            "make it readable, move it elsewhere, or give a manifest"
        )


def is_hidden(name: str) -> bool:
    """Whether a file or folder is left out for its name."""
    return name.startswith(".") or name in _OF_THE_SYSTEM


def _identity(folder: str | os.PathLike[str]) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _contains(folder: str, place: str) -> bool:
    return place == folder or place.startswith(folder.rstrip(os.sep) + os.sep)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
