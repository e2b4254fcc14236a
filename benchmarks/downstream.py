"""What pre-training is worth on labelled clips: the same small model from scratch, pre-trained, and not trained at all.

    python -m benchmarks.downstream --pool pool.jsonl --task words=my/words,features.frames=64 --task rain=my/rain.jsonl

A task is a folder with train.jsonl, valid.jsonl and test.jsonl, or one manifest whose clips have a field "fold"; behind
commas, what its fine-tuning has of its own. For each seed a tiny model is pre-trained on the pool, which needs no
labels, and four rows are filled:

- "from scratch": the model fine-tuned with fresh weights
- "fine-tuned": the same, with the pre-trained weights
- "linear probe": logistic regression on the frozen pre-trained features
- "log-mel": the same on the mean and deviation of every mel band

Everything is chosen on valid clips (of folds, a held-out tenth of the rest), the test clips are scored once. All of it
is done by commands that anybody can type; the result file holds them. What was done before, in ``--runs``, is not done
again, so that a run that was stopped goes on. ``--document`` writes the table into a page,
docs/evidence/downstream.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import write_between
from benchmarks.results import RESULTS, write_atomic
from benchmarks.runner import say
from benchmarks.tables import Table, origin
from cat.data import Manifest, load_manifest, write_manifest
from cat.data.labels import labels_of
from cat.data.splits import fold_split, folds, hold_out
from cat.provenance import ROOT, made

ROWS = ("from scratch", "fine-tuned", "linear probe", "log-mel")
SPLITS = ("train", "valid", "test")
HELD_OUT = 0.1

PRETRAINING = (
    *("optim.steps=1500", "optim.warmup_steps=100", "optim.lr=1e-3", "data.gain=true"),
    *("ema.steps=1500", "ema.start=0.998", "ema.end=0.9995", "run.checkpoint_every=250", "run.tensorboard=false"),
)
# Of a clip longer than features.frames a random place in training, its middle when scored. The rate, and that there is
# no mixup and no mask, were chosen on valid clips of one data set, for both rows.
FINETUNING = (
    *("features.frames=256", "data.crop=random", "data.batch_size=16", "head.pooling=mean"),
    *("augment.mixup=0", "augment.mask_bins=0", "augment.mask_frames=0"),
    *("optim.lr=2e-3", "optim.steps=250", "optim.warmup_steps=25", "run.checkpoint_every=50", "run.tensorboard=false"),
)
SCRATCH = ("model.preset=tiny", "optim.layer_decay=1")  # there is no layer that should move less than another


@dataclass(frozen=True)
class Task:
    """A labelled data set: a folder with its three splits, or a manifest with folds."""

    name: str
    path: Path
    options: tuple[str, ...] = ()

    @staticmethod
    def of(text: str) -> Task:
        """From NAME=PATH[,KEY=VALUE...]."""
        given, *options = text.split(",")
        name, _, path = given.partition("=")
        return Task(name, Path(path).resolve(), tuple(options))

    @property
    def folds(self) -> list[int]:
        """Empty for a folder."""
        return [] if self.path.is_dir() else sorted(set(folds(load_manifest(self.path)).tolist()))

    def splits(self, runs: Path, seed: int) -> Iterator[tuple[str, dict[str, Path]]]:
        """A name, and the manifests of the three splits: once, or for every fold."""
        if self.path.is_dir():
            yield "", {split: self.path / f"{split}.jsonl" for split in SPLITS}
            return
        manifest = load_manifest(self.path)
        labels = labels_of(manifest, "auto")
        for fold in self.folds:
            rest, test = fold_split(manifest, fold)
            train, valid = hold_out(rest, labels, HELD_OUT, seed)
            files = {split: runs / "splits" / f"{self.name}-{seed}-{fold}-{split}.jsonl" for split in SPLITS}
            for split, clips in zip(SPLITS, (train, valid, test), strict=True):
                _write_once(clips, files[split])
            yield f"-fold{fold}", files


def _write_once(manifest: Manifest, path: Path) -> None:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_manifest(manifest, path)


@dataclass(frozen=True)
class Runs:
    """Runs commands, unless what they write is there already."""

    folder: Path
    options: Sequence[str]  # overrides of every training run

    def pretrained(self, pool: Path, seed: int) -> Path:
        run = self.folder / f"pool-{seed}"
        self._train("pretrain", "quickstart", run, seed, run / "done.json", [f"data.train={pool}", *PRETRAINING])
        return run

    def finetuned(self, task: Task, seed: int, encoder: Path | None) -> list[dict[str, Any]]:
        """scores.json of the run, or of every fold's."""
        run = self.folder / f"{task.name}-{seed}-{'scratch' if encoder is None else 'tuned'}"
        given = [f"encoder={encoder or 'none'}", *FINETUNING, *(() if encoder else SCRATCH), *task.options]
        if task.path.is_dir():
            given += [f"data.{split}={task.path / split}.jsonl" for split in SPLITS]
            self._train("finetune", "finetune", run, seed, run / "scores.json", given)
            return [json.loads((run / "scores.json").read_text())]
        given += [f"data.train={task.path}", f"data.valid_share={HELD_OUT}"]
        self._train("finetune", "finetune", run, seed, run / "scores.json", given, "--folds")
        return json.loads((run / "scores.json").read_text())["runs"]

    def probed(self, name: str, splits: dict[str, Path], encoder: Path) -> dict[str, float]:
        """Test accuracy of the pre-trained features and of the log-mel statistics."""
        out = self.folder / "probes" / f"{name}.json"
        if not out.exists():
            given = [word for split in SPLITS for word in (f"--{split}", str(splits[split]))]
            self._call(["probe", str(encoder), *given, "--linear", "--out", str(out), "--quiet"])
        score = {row["features"]: row["scores"]["linear"] for row in json.loads(out.read_text())["rows"]}
        return {"linear probe": score["trained"], "log-mel": score["log-mel mean + std"]}

    def _train(
        self, command: str, recipe: str, run: Path, seed: int, done: Path, given: list[str], *flags: str
    ) -> None:
        if done.exists():
            return
        words = [command, str(ROOT / "recipes" / f"{recipe}.yaml"), f"run.dir={run.parent}", f"run.name={run.name}"]
        words += [f"run.seed={seed}", *given, *self.options, *flags]
        self._call([*words, "--resume"] if run.exists() else words)
        if not done.exists():
            write_atomic(done, json.dumps({"command": shown(words)}) + "\n")

    def _call(self, words: list[str]) -> None:
        say(f"$ {shown(words)}")
        subprocess.run([sys.executable, "-m", "cat", *words], check=True, cwd=ROOT)


def shown(words: Sequence[str]) -> str:
    return "cat-audio " + shlex.join(word.replace(f"{ROOT}/", "") for word in words)


def measure(task: Task, pool: Path, seeds: Sequence[int], runs: Runs) -> dict[str, list[list[float]]]:
    """Row -> for each seed the test accuracies, one or one a fold."""
    found: dict[str, list[list[float]]] = {row: [] for row in ROWS}
    for seed in seeds:
        encoder = runs.pretrained(pool, seed)
        for row, begin in (("from scratch", None), ("fine-tuned", encoder)):
            found[row].append([scores["test"]["accuracy"] for scores in runs.finetuned(task, seed, begin)])
        probes = [
            runs.probed(f"{task.name}-{seed}{name}", splits, encoder) for name, splits in task.splits(runs.folder, seed)
        ]
        for row in ("linear probe", "log-mel"):
            found[row].append([probe[row] for probe in probes])
    return found


def table(data: dict[str, Any]) -> Table:
    """Mean over seeds and folds; the deviation is that of the seeds' means."""
    names = list(data["tasks"])
    rows = []
    for row in ROWS:
        cells = []
        for name in names:
            means = [100 * statistics.mean(values) for values in data["tasks"][name]["accuracy"][row]]
            spread = f" ± {statistics.stdev(means):.1f}" if len(means) > 1 else ""
            cells.append(f"{statistics.mean(means):.1f}{spread}")
        rows.append([row, *cells])
    return Table("Test accuracy, %", ["", *names], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pool", type=Path, help="clips to pre-train on: a folder or a manifest")
    parser.add_argument("--task", action="append", default=[], metavar="NAME=PATH,KEY=VALUE", help="see above")
    parser.add_argument("--seeds", default="0,1,2", help="default 0,1,2")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "downstream", help="where the runs are kept")
    parser.add_argument("--options", nargs="*", default=[], metavar="KEY=VALUE", help="of every training run")
    parser.add_argument("--out", type=Path, default=RESULTS / "downstream" / "results.json")
    parser.add_argument("--document", type=Path, help="a page: write the table between its downstream markers")
    options = parser.parse_args()
    if options.pool is not None or options.task:
        if options.pool is None or not options.task:
            parser.error("--pool and --task are both needed to measure")
        tasks = [Task.of(text) for text in options.task]
        seeds = [int(seed) for seed in options.seeds.split(",")]
        runs = Runs(options.runs.resolve(), options.options)
        data: dict[str, Any] = {"seeds": seeds, "pretraining": PRETRAINING, "finetuning": FINETUNING}
        data |= {"scratch": SCRATCH, "options": options.options, "tasks": {}}
        data |= made(torch.device("cpu"))
        for task in tasks:
            accuracy = measure(task, options.pool.resolve(), seeds, runs)
            data["tasks"][task.name] = {"folds": task.folds, "options": task.options, "accuracy": accuracy}
            write_atomic(options.out, json.dumps(data, indent=1) + "\n")
    elif not options.out.exists():
        parser.error(f"there is no result file {options.out}: --pool and --task measure one")
    data = json.loads(options.out.read_text())
    found = table(data)
    if options.document is not None:
        write_between(options.document, "downstream", f"{found.markdown()}\n\n{origin(data)}.\n")
    say(found.text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
