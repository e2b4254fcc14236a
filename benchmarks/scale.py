"""What the paper's recipe takes on one GPU and on many, by arithmetic: a PREDICTION, not a measurement.

    python -m benchmarks.scale            # the table, of `cat-audio pretrain recipes/base.yaml --plan ...`
    python -m benchmarks.scale --write    # also between the markers of docs/scale.md, with one of the plans

The step is traced once for each number of clips that a GPU computes at once; no GPU is needed.
"""

from __future__ import annotations

import argparse
import functools
import sys

from benchmarks.report import write_between
from benchmarks.runner import say
from benchmarks.tables import Table
from cat.data.share import share_out
from cat.provenance import ROOT
from cat.training.plan import estimate
from cat.training.plan.estimate import Case
from cat.training.plan.hardware import Machines
from cat.training.plan.traced import Traced, trace
from cat.training.recipe import load_recipe

DOCUMENT = ROOT / "docs" / "scale.md"
# Clips of an update, machines. 192 is the paper's: two GPUs with 96 each; with more there are fewer updates.
ROWS = (
    *((192, Machines(1, gpu=gpu)) for gpu in ("h200", "a100")),
    *((192, Machines(gpus, gpu="h100")) for gpus in (1, 2, 8)),
    (768, Machines(8, gpu="h100")),
    *((1536, Machines(8, 2, gpu="h100", net=net)) for net in (40.0, 2.5)),
    (6144, Machines(8, 8, gpu="h100")),
)
CLIPS = 192 * 400_000  # that the paper's run sees
FLAC_MS, WAV_MS = 5.0, 0.5  # a clip of ten seconds at 16 kHz on one core, read, cropped, its masks drawn


def row(clips: int, machines: Machines) -> list[str]:
    recipe = load_recipe(ROOT / "recipes" / "base.yaml", ["run.name=base"])
    share = share_out(clips, recipe.data.batch_size, processes=machines.processes)
    traced = _step(share.size, min(machines.processes, 2))
    case = Case(recipe, machines, share, traced, "bf16")
    step = estimate.times(case).step(share.own)
    hours, rate = CLIPS / clips * step / 3600, clips / step / machines.nodes
    net = f", {machines.net:g} GB/s between" if machines.nodes > 1 else ""
    return [
        f"{machines.told()}{net}",
        f"{clips:,}",
        f"{share.own} x {share.size}",
        f"{estimate.memory(case)['in all'] / 2**30:.0f}",
        f"{1e3 * step:.0f}",
        f"{clips / step:,.0f}",
        f"{hours:.1f}",
        f"{hours * machines.processes:.0f}",
        f"{rate * FLAC_MS / 1e3:.0f}",
        f"{rate * WAV_MS / 1e3:.1f}",
    ]


def example() -> str:
    """The plan of one of them, but for the disk of this machine."""
    clips, machines = 768, Machines(8, gpu="h100")
    recipe = load_recipe(ROOT / "recipes" / "base.yaml", ["run.name=base", f"data.global_batch={clips}"])
    share = share_out(clips, recipe.data.batch_size, processes=machines.processes)
    return estimate.estimated(Case(recipe, machines, share, _step(share.size, 2), "bf16"), free=None).text()


@functools.cache
def _step(size: int, processes: int) -> Traced:
    """How many others there are changes nothing."""
    recipe = load_recipe(ROOT / "recipes" / "base.yaml", ["run.name=base"])
    return trace(recipe, clips=size, processes=processes, precision="bf16", dims={"": 512})


def table() -> Table:
    header = ["GPUs", "clips an update", "a GPU", "GiB", "ms an update", "clips/s", "hours", "GPU hours",
              "cores a node, FLAC", "WAV"]  # fmt: skip
    title = f"PREDICTION, not measured: the base model on the {CLIPS / 1e6:.1f} million clips that the paper's run sees"
    return Table(title, header, [row(clips, machines) for clips, machines in ROWS])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"also into {DOCUMENT.relative_to(ROOT)}")
    options = parser.parse_args()
    made = table()
    say(made.text())
    if options.write:
        write_between(DOCUMENT, "scale", f"{made.markdown()}\n")
        write_between(DOCUMENT, "plan", f"```\n{example()}\n```\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
