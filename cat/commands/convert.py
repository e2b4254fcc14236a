"""``cat-audio convert``: turn a released checkpoint into one of ours."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from safetensors import safe_open

from cat.checkpoints import save_tensors
from cat.checkpoints.released import from_released, read_released
from cat.commands._json import add_json, tell
from cat.data.features import FeatureConfig
from cat.outputs import Output, claim


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "released", type=Path, help="a released pre-training checkpoint: .pt, or .safetensors with its names"
    )
    parser.add_argument("output", type=Path, help="the .safetensors file to write")
    parser.add_argument(
        "--num-heads", type=int, help="attention heads, which the weights do not show (default: width / 64)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a file that convert did not write")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    if args.output.suffix != ".safetensors":
        raise ValueError(f"{args.output}: expected a name that ends in .safetensors")
    own = Output(args.output, _is_converted, "another name")
    claim([own], inputs=[args.released], overwrite=args.overwrite)
    student, teacher = read_released(args.released)
    model = from_released(student, teacher, num_heads=args.num_heads)
    config = {"model": dataclasses.asdict(model.config), "features": dataclasses.asdict(FeatureConfig())}
    save_tensors(args.output, model.state_dict(), config=config)
    c = model.config
    tell(
        args,
        {"written": args.output, "weights": ["student", "teacher"] if teacher else ["student"], **config},
        f"{args.output}: {c.stem} stem {c.resolutions}, width {c.embed_dim}, {c.depth} blocks, {c.num_heads} heads, "
        f"{'student and teacher' if teacher else 'student only (also used as the teacher)'}",
    )
    return 0


def _is_converted(path: Path) -> bool:
    """A file of weights and configuration that is no part of a checkpoint, which has a step."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    return "config" in metadata and "step" not in metadata
