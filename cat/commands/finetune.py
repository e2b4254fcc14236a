"""``cat-audio finetune``: a classifier on a pre-trained encoder, by a recipe, or go on with a run."""

from __future__ import annotations

import argparse
import importlib.util
import signal
from pathlib import Path

from cat.commands._json import tell
from cat.commands._plan import add_plan, check_plan, run_plan
from cat.config import ConfigError
from cat.distributed import Processes, joined
from cat.figures import write_finetune_figure
from cat.progress import say
from cat.training.directory import sole_writer
from cat.training.finetune import FinetuneResult, finetune, profile, replay
from cat.training.finetune_recipe import FinetuneConfig, load_finetune_recipe
from cat.training.profiling import STEPS
from cat.training.recipe import find_recipe, read_run
from cat.training.repeats import RepeatsResult, finetune_repeats

EXAMPLES = """\
examples:
  cat-audio finetune recipes/finetune.yaml data.train=my/sounds encoder=runs/tiny     a folder with a folder a class
  cat-audio finetune recipes/finetune.yaml data.train=a.jsonl data.test=b.jsonl encoder=none         from scratch
  cat-audio finetune recipes/finetune.yaml data.train=a.jsonl encoder=runs/tiny freeze=encoder       the head alone
  cat-audio finetune recipes/esc50.yaml data.train=esc50.jsonl encoder=runs/base --folds --seeds 3
  cat-audio finetune --resume runs/finetune                                   go on with a run that was stopped

Every field of a recipe can be set as SECTION.FIELD=VALUE; runs/NAME/config.yaml lists them all with their values.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file; with --resume also a run directory")
    parser.add_argument("overrides", nargs="*", metavar="KEY.SUB=VALUE", help="fields of the recipe to change")
    parser.add_argument("--resume", action="store_true", help="go on with the run from its newest checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="delete an earlier run of the same name first")
    parser.add_argument(
        "--folds", action="store_true", help='a run for each fold of the manifest (its field "fold"), which it tests on'
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="so many runs, with seeds from run.seed on")
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
    if args.resume and args.overwrite:
        raise ConfigError("--resume goes on with a run and --overwrite deletes it; give one of them")
    if args.profile and (args.overwrite or args.folds or args.seeds != 1):
        raise ConfigError("--profile times one run and saves nothing; leave out --overwrite, --folds and --seeds")
    check_plan(args)
    if args.plan is not None and (args.folds or args.seeds != 1):
        raise ConfigError("--plan is of one run; leave out --folds and --seeds")
    if args.replay:
        if args.resume or args.overwrite or args.profile or args.folds or args.seeds != 1:
            raise ConfigError("--replay runs one update and saves nothing; leave out the other options")
        replayed = replay(Path(args.recipe), args.overrides, progress=not args.quiet)
        tell(args, replayed.as_dict(), replayed.told())
        return 0
    config, run_dir = _config(find_recipe(args.recipe), args.overrides, resume=args.resume)
    if args.plan is not None:
        return run_plan(config, run_dir, args)
    options = {"resume": args.resume, "overwrite": args.overwrite, "progress": not args.quiet}
    if args.profile:
        profiled = profile(config, run_dir, resume=args.resume)
        if world.main:
            tell(args, profiled, profiled.table())
        return 0
    if args.folds or args.seeds != 1:
        repeats = finetune_repeats(config, run_dir, by_fold=args.folds, seeds=args.seeds, **options)
        if world.main:
            value = {"run_dir": run_dir, "metric": repeats.metric, "scores": repeats.scores}
            summary = repeats.summary() if repeats.scores else None
            stopped_by = signal.Signals(repeats.stopped_by).name if repeats.stopped_by else None
            tell(args, {**value, "summary": summary, "stopped_by": stopped_by}, _summary_of_repeats(repeats, run_dir))
        return 128 + repeats.stopped_by if repeats.stopped_by else 0
    with sole_writer(run_dir):
        result = finetune(config, run_dir, **options)
        if world.main:
            value = {**result.run.as_dict(), "steps": config.optim.steps, "scores": result.scores}
            tell(args, value, _summary(result, config))
            if config.run.figures and result.scores is not None and importlib.util.find_spec("matplotlib"):
                write_finetune_figure(run_dir, result.scores["metric"])
    return 128 + result.run.stopped_by if result.run.stopped_by else 0


def _config(recipe: Path, overrides: list[str], *, resume: bool) -> tuple[FinetuneConfig, Path]:
    if not recipe.is_dir():
        config = load_finetune_recipe(recipe, overrides)
        return config, config.run_dir
    if not resume:
        raise ConfigError(f"{recipe} is a directory; to go on with a run add --resume, else give a recipe (YAML)")
    config, note = read_run(FinetuneConfig, recipe, overrides)
    if note:
        say(note)
    return config, recipe


def _summary_of_repeats(result: RepeatsResult, run_dir: Path) -> str:
    lines = [result.table()] if result.scores else []
    if result.stopped_by:
        name = signal.Signals(result.stopped_by).name
        return "\n".join([*lines, f"stopped by {name}; go on with the same command and --resume"])
    return "\n".join([*lines, f"scores: {run_dir / 'scores.json'}"])


def _summary(result: FinetuneResult, config: FinetuneConfig) -> str:
    ended, scores, lines = result.run, result.scores, []
    if ended.stopped_by:
        lines.append(f"stopped by {signal.Signals(ended.stopped_by).name} after step {ended.step}")
    elif scores is None:
        lines.append(f"stopped at step {ended.step} of {config.optim.steps} (run.stop_at)")
    else:
        early = f", early: no better in {config.optim.patience} evaluations" if ended.early else ""
        lines.append(
            f"trained {ended.step} steps{early}; loss {ended.first_loss:.4f} at first, {ended.last_loss:.4f} at last"
        )
    if scores is not None:
        metric = scores["metric"]
        for split in ("valid", "test"):
            if scores[split]:
                chosen = f", where step {scores['step']} was chosen" if split == "valid" else ""
                lines.append(f"{split} {metric}: {scores[split][metric]:.4f} ({scores['clips'][split]} clips{chosen})")
    lines.append(f"checkpoint: {ended.checkpoint}")
    if ended.failed_clips:
        lines.append(
            f"{ended.failed_clips} clips could not be read and were left out; see {ended.run_dir / 'failures.jsonl'}"
        )
    if ended.skipped:
        lines.append(f"{ended.skipped} updates were skipped, not finite; see {ended.run_dir / 'skipped'}")
    if scores is None:
        stop_at = " run.stop_at=null" if config.run.stop_at is not None and ended.step >= config.run.stop_at else ""
        lines.append(f"go on with: cat-audio finetune --resume {ended.run_dir}{stop_at}")
    return "\n".join(lines)
