"""``cat-audio pretrain``: pre-train a model by a recipe, or go on with a run."""

from __future__ import annotations

import argparse
import importlib.util
import signal

from cat.commands._json import tell
from cat.commands._plan import add_plan, check_plan, run_plan
from cat.config import ConfigError
from cat.distributed import Processes, joined
from cat.figures import write_run_figures
from cat.progress import say
from cat.training.directory import sole_writer
from cat.training.loop import RunResult
from cat.training.pretrain import pretrain, profile, replay
from cat.training.profiling import STEPS
from cat.training.recipe import PretrainConfig, find_recipe, load_recipe, load_run

EXAMPLES = """\
examples:
  cat-audio pretrain recipes/tiny.yaml data.train=my/audio          on a folder of one's own
  cat-audio pretrain recipes/tiny.yaml data.train=my/audio run.name=other model.depth=6 optim.lr=1e-3
  cat-audio pretrain recipes/base.yaml data.global_batch=768 --plan gpus=8    what it needs on 8 GPUs, nothing starts
  cat-audio pretrain --resume runs/tiny                             go on with a run that was stopped
  cat-audio pretrain recipes/tiny.yaml data.train=my/audio --profile      where the time of a step goes
  cat-audio pretrain --replay runs/broken/skipped/step-00000123.json      what was not finite in a skipped step
  torchrun --nproc-per-node 2 -m cat pretrain recipes/tiny.yaml data.train=my/audio             in two processes

Every field of a recipe can be set as SECTION.FIELD=VALUE; runs/NAME/config.yaml lists them all with their values.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file; with --resume also a run directory")
    parser.add_argument("overrides", nargs="*", metavar="KEY.SUB=VALUE", help="fields of the recipe to change")
    parser.add_argument("--resume", action="store_true", help="go on with the run from its newest checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="delete an earlier run of the same name first")
    parser.add_argument(
        "--profile", action="store_true", help=f"time the parts of {STEPS} steps, write a trace, save nothing else"
    )
    add_plan(parser)
    parser.add_argument(
        "--replay",
        action="store_true",
        help="RECIPE is a skipped batch: say what was not finite",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress display")


def run(args: argparse.Namespace) -> int:
    with joined() as world:
        return _run(args, world)


def _run(args: argparse.Namespace, world: Processes) -> int:
    recipe = find_recipe(args.recipe)
    if args.resume and args.overwrite:
        raise ConfigError("--resume goes on with a run and --overwrite deletes it; give one of them")
    if args.profile and args.overwrite:
        raise ConfigError("--profile saves nothing, so --overwrite would only delete a run; leave it out")
    check_plan(args)
    if args.replay:
        if args.resume or args.overwrite or args.profile:
            raise ConfigError("--replay saves nothing; leave out --resume, --overwrite and --profile")
        replayed = replay(recipe, args.overrides, progress=not args.quiet)
        tell(args, replayed.as_dict(), replayed.told())
        return 0
    if recipe.is_dir():
        if not args.resume:
            raise ConfigError(f"{recipe} is a directory; to go on with a run add --resume, else give a recipe (YAML)")
        (config, note), run_dir = load_run(recipe, args.overrides), recipe
        if note:
            say(note)
    else:
        config = load_recipe(recipe, args.overrides)
        run_dir = config.run_dir
    if args.plan is not None:
        return run_plan(config, run_dir, args)
    if args.profile:
        profiled = profile(config, run_dir, resume=args.resume)
        if world.main:
            tell(args, profiled, profiled.table())
        return 0
    with sole_writer(run_dir):
        result = pretrain(config, run_dir, resume=args.resume, overwrite=args.overwrite, progress=not args.quiet)
        if world.main:
            tell(args, {**result.as_dict(), "steps": config.optim.steps}, _summary(result, config))
            if config.run.figures and not result.stopped_by and importlib.util.find_spec("matplotlib"):
                write_run_figures(result.run_dir)
    return 128 + result.stopped_by if result.stopped_by else 0


def _summary(result: RunResult, config: PretrainConfig) -> str:
    lines = []
    if result.stopped_by:
        lines.append(f"stopped by {signal.Signals(result.stopped_by).name} after step {result.step}")
    elif result.step < config.optim.steps:
        lines.append(f"stopped at step {result.step} of {config.optim.steps} (run.stop_at)")
    else:
        lines.append(
            f"trained {result.step} steps; loss {result.first_loss:.4f} at first, {result.last_loss:.4f} at last"
        )
    lines.append(f"checkpoint: {result.checkpoint}")
    if result.failed_clips:
        lines.append(
            f"{result.failed_clips} clips could not be read and were left out; see {result.run_dir / 'failures.jsonl'}"
        )
    if result.skipped:
        lines.append(f"{result.skipped} updates were skipped, not finite; see {result.run_dir / 'skipped'}")
    if result.step < config.optim.steps:
        stop_at = " run.stop_at=null" if config.run.stop_at is not None and result.step >= config.run.stop_at else ""
        lines.append(f"go on with: cat-audio pretrain --resume {result.run_dir}{stop_at}")
    return "\n".join(lines)
