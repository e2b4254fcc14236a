"""The pre-training loop: one process, the CPU or one GPU.

Every random number is a function of the seed and the step (weights of the seed alone; data order, crops and masks in
`cat.data`; the decoder's noise here), so a checkpoint holds no generator states, and a run that was killed and resumed
gives the same losses as one that was not: bit for bit on the CPU, with the same number of threads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from cat.checkpoints import store as checkpoints
from cat.checkpoints.store import Checkpoint, CheckpointError
from cat.config import ConfigError, to_mapping, write_yaml
from cat.data import Batch, Manifest, eval_batches, open_embeddings, pretrain_batches
from cat.data.masks import inverse_block_masks
from cat.model import CAT
from cat.parts import part
from cat.progress import Progress, say
from cat.signals import StopSignals
from cat.training.failures import FailureLog
from cat.training.identity import check_same_data, data_identity
from cat.training.optim import ema_decay, learning_rate, optimizer_tensors, restore_optimizer
from cat.training.recipe import PretrainConfig, check_same_run, pick_device, pick_features, pick_precision
from cat.training.records import CollapseCheck, Metrics, read_rows
from cat.training.step import PretrainStep

LOSSES = ("loss", "regression", "global", "regularisation", "pred_std", "target_std")  # in the order of PretrainOutput
NOISE_PER_STEP = 1 << 32  # offsets of the decoder's noise that one step may use; a batch of 96 takes 2^25
EVAL_NOISE = 1 << 62  # where evaluation's offsets begin


class TrainingError(RuntimeError):
    """Training cannot go on; the checkpoints written so far are good."""


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    run_dir: Path
    step: int
    checkpoint: Path | None
    first_loss: float  # mean of the run's first log_every updates
    last_loss: float  # and of its last
    failed_clips: int
    stopped_by: int | None  # signal number


class Trainer:
    """One run: model, optimiser, data and records, and the loop over them. `cat.training.pretrain` is the way in."""

    def __init__(
        self,
        config: PretrainConfig,
        run_dir: Path,
        manifest: Manifest,
        valid: Manifest | None = None,
        *,
        progress: bool = True,
    ) -> None:
        self.config, self.run_dir, self.manifest, self.valid = config, run_dir, manifest, valid
        self.device = pick_device(config.run.device)
        self.precision = pick_precision(config.run.precision, self.device)
        self.features = pick_features(config.data.features, self.device)
        self._embeddings = open_embeddings(manifest) if config.objective.regularisation_weight else None
        self._data = data_identity(manifest, valid, self._embeddings)
        self.step = self._begun_at = 0
        self.checkpoint: Path | None = None
        if config.run.cuda_graph and self.device.type != "cuda":
            raise ConfigError(
                f"run.cuda_graph=true needs a GPU, but run.device={config.run.device} is {self.device} here; "
                "use run.cuda_graph=false"
            )
        self.model = self._build_model().to(self.device)
        self.update = PretrainStep(
            self.model,
            config.optim,
            precision=self.precision,
            compile=config.run.compile,
            cuda_graph=config.run.cuda_graph,
        )
        self._rng = torch.tensor([config.run.seed, 0], device=self.device)
        self._log = torch.zeros(config.run.log_every, len(LOSSES) + 1, device=self.device)
        self._rows: list[dict[str, Any]] = []  # of the updates whose losses are still on the device
        self._since_checkpoint: list[float] = []
        self._validated: tuple[int, float] | None = None  # step and loss of the latest evaluation
        self._progress = progress
        self._stop = StopSignals()
        self._saving = False  # True after an error of saving itself

    def _build_model(self) -> CAT:
        store = self._embeddings
        with torch.random.fork_rng(devices=[]):
            run = self.config.run
            torch.manual_seed(run.seed if run.weights_seed is None else run.weights_seed)
            return CAT(self.config.model, self.config.objective, embedding_dim=store.dim if store else None)

    # ------------------------------------------------------------ resuming

    def restore(self, saved: Checkpoint) -> list[str]:
        """Take up the run where a checkpoint left it; returns notes for the user.

        Raises: `ConfigError` when configuration, precision or data are not the run's; `CheckpointError` when tensors do
        not fit.
        """
        check_same_run(saved.state["config"], self.config, self.run_dir)
        made, now = saved.state.get("made_with", {}), self._made_with()
        if made.get("precision", self.precision) != self.precision:
            raise ConfigError(
                f"{self.run_dir} was trained in {made['precision']}, and run.precision={self.config.run.precision} on "
                f"this device is {self.precision}: its numbers would change. "
                f"Resume with run.precision={made['precision']}"
            )
        self._data, notes = check_same_data(saved.state.get("data") or {}, self._data, self.config, self.run_dir)
        checkpoints.load_tensors(self.model, saved.model, str(saved.path))
        try:
            if saved.step:
                restore_optimizer(self.update.optimizer, self.update.parameters, saved.optimizer)
        except ValueError as error:
            raise CheckpointError(
                f"{saved.path / checkpoints.OPTIMIZER}: {error}; {checkpoints.remedy(saved.path)}"
            ) from None
        self.step, self.checkpoint = saved.step, saved.path
        return notes + [
            f"{key} was {made[key]} and is now {value}: losses will agree up to rounding, not bit for bit"
            for key, value in now.items()
            if key in made and made[key] != value
        ]

    def _made_with(self) -> dict[str, Any]:
        """What bit-for-bit equality depends on besides configuration and data."""
        return {
            "torch": torch.__version__,
            "device": self.device.type,
            "precision": self.precision,
            "compile": self.config.run.compile,
            "cuda_graph": self.config.run.cuda_graph,
            "kernels": self.config.model.kernels,
            "features": self.features,
            "threads": torch.get_num_threads() if self.device.type == "cpu" else None,
        }

    # ------------------------------------------------------------ the loop

    def run(self) -> RunResult:
        """Train from `step` to the end of the schedule or ``run.stop_at``, or until SIGINT, SIGTERM or SIGHUP. SIGUSR1
        asks for a checkpoint.

        An error does not cost the updates since the last checkpoint, unless it made them bad: they are saved first.
        """
        with contextlib.ExitStack() as records, self._stop:
            self._open_records(records)
            self._begun_at = self.step
            try:
                self._train()
            except Exception as error:
                self._rescue(error)
                raise
        return self._result(self._stop.received)

    def _train(self) -> None:
        run, end, stop = self.config.run, self.config.end, self._stop
        if self.valid is not None and self._validation_due() and self.metrics.last_validation < self.step:
            self._evaluate(self.valid)  # which a signal or an error kept the run from
        self.model.train()
        self._restart_clock()
        batches = self._batches(end, self.progress.say)
        while self.step < end and not stop.received:
            batch = stop.wait(lambda: next(batches))
            if batch is None:
                break
            self.failures.add(batch.failures, self.step + 1)
            self._update(batch)
            if self.step % run.log_every == 0:
                self._flush()
            if self.valid is not None and run.eval_every and self.step % run.eval_every == 0:
                self._evaluate(self.valid)
            asked = stop.save_asked() and self.step < end
            if asked or self.step % run.checkpoint_every == 0:
                self._save(hurried=self.step % run.checkpoint_every != 0)
                if asked:
                    self.progress.say(f"step {self.step}: saved {self.checkpoint}, as SIGUSR1 asked")
        self._save()

    def _validation_due(self) -> bool:
        """Whether a run that is not disturbed evaluates at this step."""
        every = (self.config.run.eval_every, self.config.run.checkpoint_every)
        return self.step == self.config.end or any(n and self.step and self.step % n == 0 for n in every)

    def _rescue(self, error: Exception) -> None:
        """Save the updates since the last checkpoint before an error ends the run; ``error`` says what became of it."""
        if self.step == self._begun_at or isinstance(error, TrainingError) or self._saving:
            return
        try:
            if not self.update.whole:
                raise TrainingError("the error came in the middle of an update")
            self._save(hurried=True)
        except Exception as second:
            last = self.checkpoint or "none"
            error.add_note(f"step {self.step} could not be saved ({second}); the last checkpoint: {last}")
        else:
            error.add_note(f"step {self.step} is saved; go on with: cat-audio pretrain --resume {self.run_dir}")

    def unrecorded(self, count: int) -> Iterator[int]:
        """For profiling: ``count`` updates from where the run stands, one a turn, that leave no records. Yields their
        numbers of clips."""
        self.model.train()
        self._restart_clock()
        batches = self._batches(self.step + count)
        for _ in range(count):
            with part("data wait"):
                batch = next(batches)
            self._update(batch)
            self._rows.clear()
            yield len(batch.clips)

    def _open_records(self, records: contextlib.ExitStack) -> None:
        run, data = self.config.run, self.config.data
        self.run_dir.mkdir(parents=True, exist_ok=True)
        write_yaml(self.config, self.run_dir / "config.yaml")
        self.progress = Progress(self.config.end, self.step, label=self.run_dir.name, enabled=self._progress)
        records.callback(self.progress.close)
        self.metrics = Metrics(self.run_dir, start_step=self.step, tensorboard=run.tensorboard, warn=self.progress.say)
        records.callback(self.metrics.close)
        self.failures = FailureLog(
            self.run_dir / "failures.jsonl",
            max_share=data.max_failed_share,
            clips=len(self.manifest),
            batch_size=data.batch_size,
            start_step=self.step,
        )
        records.callback(self.failures.close)
        self.collapse = CollapseCheck(
            pred_std=run.collapse_pred_std, target_std=run.collapse_target_std, steps=run.collapse_steps
        )
        size = sum(parameter.numel() for parameter in self.update.parameters.values()) / 1e6
        self.progress.say(
            f"{self.run_dir}: {size:.2f} M parameters to train on {len(self.manifest)} clips, {self.device} in "
            f"{self.precision}"
        )

    def _batches(self, end: int, warn: Callable[[str], None] = say) -> Iterator[Batch]:
        config = self.config
        return pretrain_batches(
            config.data,
            config.features,
            config.masks,
            patch_size=config.model.patch_size,
            seed=config.run.seed,
            start_step=self.step,
            num_steps=end - self.step,
            manifest=self.manifest,
            waveforms=self.features == "gpu",
            warn=warn,
        )

    def _update(self, batch: Batch) -> None:
        """One optimiser step. Nothing here waits for the device."""
        lr, decay = learning_rate(self.config.optim, self.step), ema_decay(self.config.ema, self.step + 1)
        tensors = self._inputs(batch, self.step * NOISE_PER_STEP)
        self._log[len(self._rows)] = self.update(*tensors, lr=lr, decay=decay)
        self.step += 1
        self._clips += len(batch.clips)
        self._rows.append({"lr": lr, "ema_decay": decay})

    def _inputs(self, batch: Batch, noise_offset: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """What the model takes, on its device."""
        with part("input"):
            batch = batch.to(self.device).with_features(self.config.features)
            self._rng[1].fill_(noise_offset)
        return cast(Tensor, batch.spec), cast(Tensor, batch.visible), batch.embedding, self._rng

    # ------------------------------------------------------------ records

    def _restart_clock(self) -> None:
        self._clock, self._clips = time.perf_counter(), 0

    def _flush(self) -> None:
        """Fetch the losses of the updates since the last time, in one copy, and record them."""
        if not self._rows:
            return
        values = self._log[: len(self._rows)].tolist()
        first = self.step - len(self._rows) + 1
        rows = [
            {"step": first + i, **dict(zip((*LOSSES, "grad_norm"), line, strict=True)), **row}
            for i, (line, row) in enumerate(zip(values, self._rows, strict=True))
        ]
        seconds = time.perf_counter() - self._clock
        self.metrics.train(rows, clips_per_s=self._clips / seconds, seconds=seconds)
        self._rows = []  # not before they are written: no checkpoint without the rows of its updates
        self._check_finite(rows)
        losses = [row["loss"] for row in rows]
        self._since_checkpoint += losses
        self.progress.advance(self.step, f"loss {sum(losses) / len(losses):.4f}, {self._clips / seconds:.1f} clips/s")
        for warning in self.collapse.update(rows):
            self.progress.say(f"warning: {warning}")
        self._restart_clock()

    def _check_finite(self, rows: list[dict[str, Any]]) -> None:
        bad = next((row for row in rows if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]))), None)
        if bad is None:
            return
        parts = ", ".join(f"{name} {bad[name]:g}" for name in (*LOSSES[:4], "grad_norm"))
        raise TrainingError(f"the loss or its gradient is not finite at step {bad['step']} ({parts}); {self._remedy()}")

    def _check_parameters(self) -> None:
        """An update can spoil the weights though its own loss was finite; that must not become a checkpoint."""
        norms = torch.nn.utils.get_total_norm(self.update.parameters.values())
        if not math.isfinite(norms.item()):
            raise TrainingError(f"the weights are not finite after step {self.step}; {self._remedy()}")

    def _remedy(self) -> str:
        kept = f"the last good checkpoint is {self.checkpoint}" if self.checkpoint else "no checkpoint was written yet"
        fp32 = ", or run.precision=fp32" if self.precision == "bf16" else ""
        return f"{kept}. Start another run (run.name=OTHER) with a lower optim.lr or a longer optim.warmup_steps{fp32}"

    @torch.no_grad()
    def _evaluate(self, valid: Manifest) -> float | None:
        """The validation loss: centre crops, with masks and noise that are the same every time. None when a signal ends
        it; the run that goes on makes up for it."""
        self._flush()
        config, clips = self.config, 0
        total = torch.zeros(len(LOSSES), device=self.device)
        self.model.eval()
        batches = eval_batches(
            valid,
            config.features,
            config.data.batch_size,
            config.data.num_workers,
            waveforms=self.features == "gpu",
            warn=self.progress.say,
        )
        while (batch := self._stop.wait(lambda: next(batches, None))) is not None:
            self.failures.add(batch.failures, self.step, split="valid")
            visible = inverse_block_masks(config.masks, config.grid, seed=config.run.seed, step=0, clips=batch.clips)
            batch = dataclasses.replace(batch, visible=visible)
            output = self.update.losses(*self._inputs(batch, EVAL_NOISE + batch.step * NOISE_PER_STEP))
            total += torch.stack([value.float() for value in output]) * len(batch.clips)
            clips += len(batch.clips)
        self.model.train()
        if self._stop.received:
            return None
        means = dict(zip(LOSSES, (total / clips).tolist(), strict=True))
        self.metrics.valid({"step": self.step, **means})
        self.progress.say(f"step {self.step}: validation loss {means['loss']:.4f}")
        self._validated = (self.step, means["loss"])
        self._restart_clock()
        return means["loss"]

    def _save(self, *, hurried: bool = False) -> None:
        """Write a checkpoint unless this step has one. ``hurried``: without a score, which may need an evaluation."""
        if self.checkpoint is not None and self.checkpoint.name == checkpoints.step_name(self.step):
            return
        self._flush()
        self._check_parameters()
        hurried = hurried or self._stop.received is not None
        score = None if hurried else self._score()
        self.metrics.sync()
        self._saving = True
        self.checkpoint = checkpoints.save(
            self.run_dir / "checkpoints",
            step=self.step,
            model=self.model.state_dict(),
            optimizer=optimizer_tensors(self.update.optimizer, self.update.parameters),
            config=to_mapping(self.config),
            score=score,
            extra={"made_with": self._made_with(), "data": self._data},
        )
        self._saving = False
        checkpoints.prune(
            self.run_dir / "checkpoints", keep_last=self.config.run.keep_last, keep_best=self.config.run.keep_best
        )
        if not hurried:
            self._since_checkpoint = []
        self._restart_clock()

    def _score(self) -> float | None:
        """Validation loss at this step, or the mean training loss since the last checkpoint: of one kind in a run."""
        if self._data["valid"] is None:
            losses = self._since_checkpoint
            return sum(losses) / len(losses) if losses else None
        if self.valid is None:
            return None
        if self._validated is not None and self._validated[0] == self.step:
            return self._validated[1]
        return self._evaluate(self.valid)

    def _result(self, stopped_by: int | None) -> RunResult:
        run = self.config.run
        losses = [row["loss"] for row in read_rows(self.run_dir / "metrics.jsonl", "train")]
        first, last = losses[: run.log_every], losses[-run.log_every :]
        return RunResult(
            self.run_dir,
            self.step,
            self.checkpoint,
            sum(first) / max(1, len(first)),
            sum(last) / max(1, len(last)),
            self.failures.count,
            stopped_by,
        )
