"""``--plan``, of pre-training and of fine-tuning."""

from __future__ import annotations

import argparse
from pathlib import Path

from cat.commands._json import add_json, tell
from cat.config import ConfigError
from cat.training.finetune_recipe import FinetuneConfig
from cat.training.plan.hardware import GPUS, read_machines
from cat.training.recipe import PretrainConfig


def add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plan",
        metavar="gpus=N,...",
        help="start nothing; say what the run needs (memory, hours, cores, disk) and what would stop it, with exit "
        f"code 1 then: gpus=N of a node, nodes=M, gpu={'|'.join(GPUS)}, link=nvlink|pcie, net=GB/s between nodes, "
        "cores=N of a node, step_ms=T as --profile measured it",
    )
    add_json(parser)


def check_plan(args: argparse.Namespace) -> None:
    """Raises: `ConfigError` for options that do not go together."""
    if args.plan is not None and (args.profile or args.replay):
        raise ConfigError("--plan starts nothing; leave out --profile and --replay, which compute steps")


def run_plan(config: PretrainConfig | FinetuneConfig, run_dir: Path, args: argparse.Namespace) -> int:
    from cat.training.plan.planning import make_plan  # brings all that training consists of

    plan = make_plan(config, read_machines(args.plan), run_dir, resume=args.resume, overwrite=args.overwrite)
    tell(args, plan.as_dict(), plan.text())
    return 1 if plan.problems else 0
