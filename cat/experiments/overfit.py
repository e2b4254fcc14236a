"""Can the model fit one batch?"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from cat.config import ConfigError
from cat.data import pretrain_batches
from cat.experiments.verdict import Verdict
from cat.model import CAT
from cat.training.optim import build_optimizer, clip_gradients, set_learning_rate, trainable
from cat.training.recipe import PretrainConfig, pick_device

FALL = 0.9


def overfit(config: PretrainConfig, *, say: Callable[[str], None] = print) -> Verdict:
    """Trains on the run's first batch alone until L_p has fallen by 90 %, or for ``optim.steps`` updates.

    Everything that changes from step to step in pre-training is held still: the batch, its masks, the decoder's noise,
    and the teacher, which stays as it was initialised. With a teacher that follows the student, the targets change
    under the loss, and a loss may also fall because targets collapse; against fixed targets, which the random teacher
    makes different for every patch (deviation about 1), it falls only if student and decoder can fit them. The rate is
    constant after the warm-up, there is no weight decay, and the model has no dropout. The optimised loss is the whole
    objective; the verdict is on its regression part, against the first step's.
    """
    if config.guides:
        raise ConfigError(
            f"guides.{next(iter(config.guides))}: overfit trains on one batch without guides; leave it out"
        )
    device = pick_device(config.run.device)
    torch.manual_seed(config.run.seed)
    batch = _first_batch(config).to(device)
    model = CAT(config.model, config.objective).to(device).train()
    parameters = trainable(model)
    optimizer = build_optimizer(parameters, config.optim)
    rng = torch.tensor([config.run.seed, 0], device=device)
    curve: list[dict[str, float]] = []
    started = time.perf_counter()
    for step in range(1, config.optim.steps + 1):
        set_learning_rate(optimizer, config.optim.lr * min(1.0, step / max(1, config.optim.warmup_steps)))
        output = model(batch.spec, batch.visible, rng=rng)
        output.loss.backward()
        clip_gradients(parameters.values(), config.optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        names = ("loss", "regression", "global", "regularisation", "pred_std", "target_std")
        curve.append({"step": step, **dict(zip(names, (value.item() for value in output.numbers), strict=True))})
        share = curve[-1]["regression"] / curve[0]["regression"]
        if step == 1 or step % 25 == 0:
            say(f"step {step}: regression loss {curve[-1]['regression']:.3f}, {100 * share:.0f} % of the first")
        if share <= 1 - FALL or not math.isfinite(share):
            break
    seconds = time.perf_counter() - started
    first, last = curve[0], curve[-1]
    fallen = 1 - last["regression"] / first["regression"]
    shown = [curve[i] for i in sorted({0, *range(24, len(curve), 25), len(curve) - 1})]
    return Verdict(
        passed=fallen >= FALL,
        text=f"the regression loss fell by {100 * fallen:.1f} % in {len(curve)} steps ({seconds:.0f} s); needed: 90 %",
        columns=("step", "regression", "share of the first", "prediction std", "target std"),
        rows=[
            (
                f"{row['step']}",
                f"{row['regression']:.3f}",
                f"{100 * row['regression'] / first['regression']:.1f} %",
                f"{row['pred_std']:.3f}",
                f"{row['target_std']:.3f}",
            )
            for row in shown
        ],
        values={"fallen": fallen, "seconds": seconds, "curve": curve},
    )


def _first_batch(config: PretrainConfig) -> Any:
    batches = pretrain_batches(
        config.data,
        config.features,
        config.masks,
        patch_size=config.model.patch_size,
        seed=config.run.seed,
        num_steps=1,
    )
    return next(batches)
