"""Numbers of GPUs and of what joins them, each with where it comes from; and what ``--plan`` is told of them."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from typing import Any

from cat.training.flops import PEAKS


@dataclass(frozen=True)
class Gpu:
    """From the maker's data sheet; memory as the driver shows it."""

    name: str  # in `cat.training.flops.PEAKS`
    memory_GiB: float
    bandwidth_TBps: float
    link: str = "pcie"  # what usually joins those of a node

    @property
    def matrix_TFLOPS(self) -> float:
        return PEAKS[self.name] / 1e12


GPUS = {
    "b200": Gpu("B200", 179, 8.0, "nvlink"),
    "h200": Gpu("H200", 140, 4.8, "nvlink"),
    "h100": Gpu("H100", 79.6, 3.35, "nvlink"),
    "a100": Gpu("A100", 79.6, 2.04, "nvlink"),
    "a100-40": Gpu("A100", 39.6, 1.56, "nvlink"),
    "l40s": Gpu("L40S", 45, 0.86),
    "rtx4090": Gpu("RTX 4090", 23.6, 1.01),
    "a10g": Gpu("A10G", 22.5, 0.6),
    "l4": Gpu("L4", 22.5, 0.3),
}

# GB/s that an all-reduce reaches on one GPU, in each direction. NVLink's are 0.75 of the datasheet's, a guess; those of
# PCIe and of the network are guesses.
NVLINK_GBPS = {"b200": 675.0, "h200": 340.0, "h100": 340.0, "a100": 225.0, "a100-40": 225.0}
PCIE_GBPS = 20.0
NETWORK_GBPS = 40.0  # of a node: one adapter of 400 Gbit/s, 0.8 of it

LINKS = ("nvlink", "pcie")


@dataclass(frozen=True)
class Machines:
    """What a run is planned for.

    Attributes:
        gpus: of a node, a process each.
        nodes: machines with so many.
        gpu: one of `GPUS`.
        link: between the GPUs of a node, one of `LINKS`; empty: what is usual for this GPU.
        net: GB/s between nodes, all GPUs of a node together.
        step_ms: of the clips that a GPU computes at once, measured on one (``--profile``); 0: estimated.
        cores: CPU cores of a node; 0: those of this machine.
    """

    gpus: int = 1
    nodes: int = 1
    gpu: str = "h100"
    link: str = ""
    net: float = NETWORK_GBPS
    step_ms: float = 0.0
    cores: int = 0

    def __post_init__(self) -> None:
        for name in ("gpus", "nodes"):
            if not 1 <= getattr(self, name) <= 100_000:
                raise ValueError(f"{name}={getattr(self, name)}; expected 1 or more")
        for name in ("step_ms", "cores"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)}; expected 0 (not known) or more")
        if not 0 < self.net < float("inf"):
            raise ValueError(f"net={self.net}; expected GB/s of a node's network, as in net=50")
        if self.gpu not in GPUS:
            raise ValueError(f"gpu={self.gpu}; expected one of {', '.join(GPUS)}")
        if self.link not in ("", *LINKS):
            raise ValueError(f"link={self.link}; expected one of {', '.join(LINKS)}")
        if self.link == "nvlink" and self.gpu not in NVLINK_GBPS:
            raise ValueError(f"link=nvlink with gpu={self.gpu}, which has none; expected link=pcie")

    @property
    def processes(self) -> int:
        return self.gpus * self.nodes

    @property
    def card(self) -> Gpu:
        return GPUS[self.gpu]

    @property
    def joined_by(self) -> str:
        """The slowest link of a ring of all processes."""
        return "network" if self.nodes > 1 and self.net < self._inside else self.link or self.card.link

    @property
    def ring_GBps(self) -> float:
        return min(self.net, self._inside) if self.nodes > 1 else self._inside

    @property
    def _inside(self) -> float:
        link = self.link or self.card.link
        return NVLINK_GBPS[self.gpu] if link == "nvlink" else PCIE_GBPS

    def told(self) -> str:
        """ "16 h100 (2 nodes of 8)" """
        nodes = f" ({self.nodes} nodes of {self.gpus})" if self.nodes > 1 else ""
        return f"{self.processes} {self.gpu}{nodes}"


def read_machines(text: str) -> Machines:
    """``gpus=8,nodes=2,gpu=h200``, as ``--plan`` has it.

    Raises: ValueError that names the key, and what was expected.
    """
    types: dict[str, Any] = {field.name: type(field.default) for field in fields(Machines)}
    given: dict[str, int | float | str] = {}
    for pair in filter(None, text.split(",")):
        key, sign, value = (part.strip() for part in pair.partition("="))
        if not sign or key not in types:
            near = difflib.get_close_matches(key, types, 1)
            meant = f"; did you mean {near[0]}?" if near and sign else ""
            raise ValueError(f"--plan {text}: {pair!r}; expected KEY=VALUE of {', '.join(types)}{meant}")
        if key in given:
            raise ValueError(f"--plan {text}: {key} is given twice")
        try:
            given[key] = types[key](value.lower() if types[key] is str else value)
        except ValueError:
            kind = {int: "a whole number", float: "a number"}[types[key]]
            raise ValueError(f"--plan {text}: {key}={value}; expected {kind}") from None
    try:
        return Machines(**given)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"--plan {text}: {error}") from None
