"""What is in a wheel: its module's symbols, what it needs of the system, its size. And what must not be."""

from __future__ import annotations

import json
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile

GLIBC = (2, 28)  # the oldest that wheels run with; setup.py's build runs with this machine's
LARGEST = 10_000_000  # bytes
# glibc's. Later ones have all of it in libc.so.6, and the rest empty.
LIBRARIES = {"libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1", "ld-linux-x86-64.so.2"}
ARCHITECTURES = ["80", "86", "89", "90", "100", "120", "120-virtual"]


@dataclass(frozen=True)
class Module:
    """The dynamic symbols of an ELF file."""

    needed: frozenset[str]  # libraries
    undefined: dict[str, str]  # symbol -> the version it must have, GLIBC_2.14; empty where any will do
    weak: frozenset[str]  # of the undefined, those that may be missing
    exported: frozenset[str]

    @classmethod
    def read(cls, file: BinaryIO) -> Module:
        elf = ELFFile(file)
        symbols = elf.get_section_by_name(".dynsym")
        numbers = elf.get_section_by_name(".gnu.version")
        versions = elf.get_section_by_name(".gnu.version_r")
        dynamic = next(section for section in elf.iter_sections() if isinstance(section, DynamicSection))
        names = {auxiliary["vna_other"]: auxiliary.name for _, needs in versions.iter_versions() for auxiliary in needs}
        undefined, weak, exported = {}, set(), set()
        for index, symbol in enumerate(symbols.iter_symbols()):
            if not symbol.name:
                continue
            if symbol["st_shndx"] != "SHN_UNDEF":
                exported.add(symbol.name)
                continue
            undefined[symbol.name] = names.get(numbers.get_symbol(index)["ndx"], "")
            if symbol["st_info"]["bind"] == "STB_WEAK":
                weak.add(symbol.name)
        needed = frozenset(tag.needed for tag in dynamic.iter_tags() if tag.entry.d_tag == "DT_NEEDED")
        return cls(needed, undefined, frozenset(weak), frozenset(exported))

    def strangers(self, also: tuple[str, ...] = ()) -> list[str]:
        """Symbols that neither glibc nor Python has: those of libcudart, libtorch or another library. `also`: how the
        versions of what else is allowed begin."""
        return sorted(
            name
            for name, version in self.undefined.items()
            if not version.startswith(("GLIBC_", *also)) and not re.match(r"_?Py", name) and name not in self.weak
        )

    def too_new(self, glibc: tuple[int, int] = GLIBC) -> list[str]:
        """Symbols of a glibc that is newer than the oldest one."""
        return sorted(f"{name} ({version})" for name, version in self.undefined.items() if _of_glibc(version) > glibc)


def _of_glibc(version: str) -> tuple[int, ...]:
    found = re.fullmatch(r"GLIBC_([\d.]+)", version)
    return tuple(int(number) for number in found[1].split(".")) if found else (0,)


def problems(wheel: Path, cuda: bool) -> list[str]:
    """Why a wheel must not be published, a sentence each; empty where it may be."""
    found = []
    if wheel.stat().st_size > LARGEST:
        found.append(f"it has {wheel.stat().st_size:,} bytes, more than {LARGEST:,}")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        modules = [name for name in names if re.fullmatch(r"cat_kernels/_C\.[\w-]+\.so", name)]
        if len(modules) != 1:
            return [*found, f"it has {len(modules)} modules cat_kernels/_C, not one (is there a C++ compiler?)"]
        if others := [name for name in names if re.search(r"\.so(\.|$)|\.libs/", name) and name not in modules]:
            found.append(f"libraries were put into it: {', '.join(others)}")
        strays = {name.split("/")[0] for name in names} - {"cat", "cat_kernels"}
        if strays := {name for name in strays if not name.endswith(".dist-info")}:
            found.append(f"it would install {', '.join(sorted(strays))} beside the two packages")
        with archive.open(modules[0]) as file:
            module = Module.read(file)
        record = json.loads(archive.read("cat_kernels/_build.json"))
    if others := sorted(module.needed - LIBRARIES):
        found.append(f"its module needs {', '.join(others)}, which are not of glibc")
    if names := module.strangers():
        found.append(f"its module needs symbols that neither glibc nor Python has: {', '.join(names[:5])}")
    if names := module.too_new():
        found.append(f"its module needs a glibc newer than {'.'.join(map(str, GLIBC))}: {', '.join(names[:5])}")
    if module.exported != {"PyInit__C"}:
        found.append(f"its module shows more than PyInit__C: {', '.join(sorted(module.exported)[:5])}")
    if cuda and record["architectures"] != ARCHITECTURES:
        has = ", ".join(record["architectures"]) or f"none ({record['cuda_reason']})"
        found.append(f"its GPU code is for {has}; wheels are for {', '.join(ARCHITECTURES)}")
    return found
