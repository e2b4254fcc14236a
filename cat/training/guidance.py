"""Does the student follow its guides, the external encoders? What a run can tell from embeddings and from its losses.

The measure of L_r is what the best constant prediction gets: a student that has learned nothing of the guide but its
average is there, and what L_r is below it the student knows about the clip. ``regularisation_explained``, a number of
every update in ``metrics.jsonl``, is that share: 1 - L_r / constant. All of it is computed on the host.

Guides go by the names of their terms in `cat.model.CAT`: "" is the one whose embeddings ``data.train`` names. A live
guide's embeddings are not known before it has heard the clips, so it has no such measure; those of the first batches
would not do, as a run that goes on begins with other ones. Whether it pulls at the student is looked at all the same.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cat.data import AudioError, Manifest
from cat.data.embeddings import EmbeddingFiles, EmbeddingStore
from cat.model import Regularisation
from cat.model.regularisation import DISTANCES
from cat.training.recipe import PretrainConfig

SAMPLED = 2_048  # rows that stand for all; the constant is then within a few per cent
JUDGED = 512  # clips whose mean L_r is compared with it: of 80 it was up to 5 % off, by which clips they were
FOLLOWED = (0.02, 0.05)  # explained: the student does not follow the guide below, and does above; between, as it was
FALLING = 0.95  # L_r over that of the clips before: not yet judged, as a head may long be busy to find the mean

# Limits of warnings at the start, measured on 334 to 523 clips of sound events, drum hits, digits, ESC-10, a mixture.
# Of the energy of unit vectors 0.05 to 0.74 is not in their mean for YAMNet and a speech encoder, and 0.00004 to 0.016
# where they heard the clips padded with silence to ten seconds. Of the latter 0.34 to 0.77 have doubles where most are
# short, of the speech encoder's, and of YAMNet's on the mixture; without padding at most 0.16, of the random control
# 0.21. ESC-10's five seconds padded to ten are not recognised (0.016, and 0.06 doubles).
SPREAD = 0.005
ALIKE, DUPLICATES = 0.01, 0.3  # squared distance of doubles, over the mean one; their share
COMPARED = 512  # rows: nearest neighbours are the nearer the more there are
NORMS = 100.0
# weight * L_r over L_p, each of its best constant prediction. Recipes that work have 0.1 to 1. With 0.01 the tiny model
# explained no more after 120 steps than with a head that is not wired to it; with 20 neither, and L_p was 8.9, not 5.7.
WEAK, STRONG = 0.01, 20.0

# regularisation_distance -> of embeddings (n, D_e) the constant prediction with the smallest mean distance to them.
BEST_CONSTANT: dict[str, Callable[[Tensor], Tensor]] = {
    "l2": lambda rows: rows.mean(0),
    "l1": lambda rows: rows.median(0).values,
    "cosine": lambda rows: F.normalize(rows, dim=-1).mean(0),
    "kl": lambda rows: rows.log_softmax(-1).mean(0),
    "bare_cosine": lambda rows: F.normalize(rows, dim=-1).mean(0),
    "kl_from_external": lambda rows: rows.softmax(-1).mean(0).log(),
}


def sample_rows(store: EmbeddingStore | EmbeddingFiles, rows: np.ndarray, count: int = SAMPLED) -> Tensor:
    """(n, D_e) float32, n <= count: embeddings of clips spread evenly over the list; ``rows`` are all clips' places in
    the store. Those that cannot be read or are not finite are left out, as in training."""
    picked = rows[_spread(len(rows), count)]
    found = []
    for row in picked.tolist():
        try:
            found.append(store.rows([row])[0])
        except AudioError:  # named when its clip's turn comes
            continue
    return torch.from_numpy(np.stack(found)) if found else torch.empty(0, store.dim)


def _spread(number: int, count: int) -> np.ndarray:
    """``count`` indices below ``number``, or all."""
    return np.unique(np.linspace(0, number - 1, min(number, count)).astype(np.int64))


def constant_loss(rows: Tensor, term: Regularisation) -> float | None:
    """L_r of one clip-clone, in the mean over embeddings (n, D_e), for the best prediction that is the same for all: of
    "l2" their variance over sqrt(D_e).

    None where there is no such thing: of rows that are all the same, and where it is the embedding that is projected
    (``projection`` "external"): that projection can make anything of L_r.
    """
    if len(rows) < 2 or term.projection != "student":
        return None
    rows = F.normalize(rows.double(), dim=-1) if term.normalise else rows.double()
    best = BEST_CONSTANT[term.distance](rows)
    loss = float(DISTANCES[term.distance](best.expand_as(rows), rows).mean())
    return loss if loss > 1e-12 else None


def reduced(loss: float, config: PretrainConfig) -> float:
    """The loss of one clip-clone as ``objective.global_loss_reduction`` makes one of a batch."""
    summed = config.objective.global_loss_reduction == "sum"
    return loss * (config.data.update_clips * config.masks.num_masks if summed else 1)


# ---------------------------------------------------------------- names


def column(value: str, guide: str) -> str:
    """What an update's row calls a ``value`` of the guide: "regularisation" or "regularisation.NAME"."""
    return f"{value}.{guide}" if guide else value


def setting(field: str, guide: str) -> str:
    """What a recipe calls a ``field`` of the guide's `Regularisation`."""
    return f"guides.{guide}.{field}" if guide else f"objective.regularisation_{field}"


def _of(guide: str, warning: str) -> str:
    return f"guides.{guide}: {warning}" if guide else warning


# ---------------------------------------------------------------- all guides of a run


Stored = tuple[EmbeddingStore | EmbeddingFiles, np.ndarray]  # embeddings, and of every clip its row among them


class Guidance:
    """What a run says of its guides. ``terms``: those of `cat.model.CAT`; ``stored``: the embeddings of those that are
    not live.

    With ``run.guidance_share`` 0 it warns of nothing.
    """

    def __init__(
        self,
        config: PretrainConfig,
        manifest: Manifest,
        terms: Mapping[str, Regularisation],
        stored: Mapping[str, Stored],
    ) -> None:
        self.warns = config.run.guidance_share > 0
        embedded = (manifest.embeddings or manifest.embedding_files) is not None
        self._advice = [UNUSED] if embedded and not terms else []
        self._checks: dict[str, GuidanceCheck] = {}
        for guide, (store, rows) in stored.items():
            self._look_at(guide, terms[guide], sample_rows(store, rows), config)

    def _look_at(self, guide: str, term: Regularisation, rows: Tensor, config: PretrainConfig) -> None:
        optim, advice, constant = config.optim, warnings_of_rows(rows, guide), constant_loss(rows, term)
        if constant is not None:
            constant = reduced(constant, config)
            if not advice:  # no weight mends a guide that is no use
                advice = warnings_of_weight(constant, term.weight, config.model.embed_dim, guide)
            warm_up = max(optim.warmup_steps, term.steps if term.schedule == "warmup" else 0)
            self._checks[guide] = GuidanceCheck(
                constant,
                after=warm_up + round(config.run.guidance_share * max(0, optim.steps - warm_up)),
                window=max(1, min(math.ceil(JUDGED / config.data.update_clips), optim.steps // 8)),
                guide=guide,
            )
        self._advice += [_of(guide, warning) for warning in advice]

    def advice(self) -> list[str]:
        """What can be said before the first update."""
        return self._advice if self.warns else []

    def derived(self, row: Mapping[str, Any]) -> dict[str, float]:
        """What is recorded beside an update's losses."""
        return {
            column("regularisation_explained", guide): check.explained(row[column("regularisation", guide)])
            for guide, check in self._checks.items()
        }

    def update(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        checks = self._checks.items() if self.warns else ()
        return [_of(guide, warning) for guide, check in checks for warning in check.update(rows)]


# ---------------------------------------------------------------- before the first update


def warnings_of_rows(rows: Tensor, guide: str = "") -> list[str]:
    """What is wrong with embeddings (n, D_e) whoever learns from them, each with its remedy.

    Not whether the guide is one for these sounds: nothing in its embeddings alone tells that.
    """
    if len(rows) < 2:
        return []
    lengths = rows.double().norm(dim=-1)
    found = []
    if not lengths.min() * NORMS >= lengths.max():
        found.append(
            f"the external embeddings' lengths go from {lengths.min():.3g} to {lengths.max():.3g}: the longest will "
            f"have nearly all of L_r; set {setting('normalise', guide)}=true, and look at the clips with the odd ones"
        )
    units = F.normalize(rows.double(), dim=-1)
    centred = units - units.mean(0)
    spread = float(centred.square().sum(-1).mean())
    if spread < SPREAD:
        found.append(
            f"the guide hardly tells the clips apart: {100 * (1 - spread):.2f} % of its embeddings' energy is the same "
            f"in all (measured of encoders that hear the sound: 26 to 95 %). {_HEARD}"
        )
    else:
        share = _duplicates(centred[_spread(len(centred), COMPARED)])
        if share > DUPLICATES:
            found.append(
                f"{100 * share:.0f} % of the clips have an external embedding that another clip has too, or nearly. "
                f"{_HEARD}"
            )
    return found


_HEARD = (
    "Did the encoder hear the sound, at its own sample rate, and not mostly the padding? Embed the clips without "
    "padding, or with an encoder that leaves it out (`cat-audio embed`)"
)


def _duplicates(centred: Tensor) -> float:
    """The share of rows that have a double, or nearly: closer to it than `ALIKE` of a mean distance."""
    squares = centred.square().sum(-1)
    distances = squares[:, None] + squares - 2 * centred @ centred.T
    distances.fill_diagonal_(math.inf)
    return float((distances.min(1).values < ALIKE * 2 * squares.mean()).double().mean())


def warnings_of_weight(constant: float, weight: float, width: int, guide: str = "") -> list[str]:
    """Whether weight * L_r is of the size of L_p: both of the best constant prediction, for L_p sqrt(width), as its
    targets have mean 0 and deviation 1. ``constant``: L_r's, reduced as the run's."""
    one = constant / math.sqrt(width)  # at weight 1
    if WEAK <= weight * one <= STRONG:
        return []
    low, high = (float(f"{share / one:.1g}") for share in (0.1, 1.0))
    sizes = (
        f"with {setting('weight', guide)}={weight:g} what there is to learn from it is {weight * one:.3g} times "
        f"what there is to learn from the patches; expected 0.1 to 1, a weight from {low:g} to {high:g}"
    )
    if weight * one < WEAK:
        return [f"the student will hardly feel the guide: {sizes}"]
    return [f"the guide will drown the patches: {sizes}, or {setting('normalise', guide)}=true"]


def unwired(cls: Tensor, guides: Iterable[str], loss: Callable[[Mapping[str, Tensor]], Tensor]) -> list[str]:
    """The guides that do not pull at the student: whose terms of ``loss``, which is linear in their weights, 0-dim
    tensors by the guides' names, have no gradient for the CLS token. Waits for the device, once."""
    weights = {guide: torch.ones((), device=cls.device, requires_grad=True) for guide in guides}
    # What the loss is the larger for a weight of 1 more: L_r itself, each guide's, of one pass through the model.
    terms = torch.autograd.grad(loss(weights), list(weights.values()), create_graph=True)
    pulls = [torch.autograd.grad(term, cls, retain_graph=True, allow_unused=True)[0] for term in terms]
    pulled = torch.stack([(torch.zeros_like(cls) if pull is None else pull).count_nonzero() for pull in pulls])
    return [guide for guide, by in zip(weights, pulled.tolist(), strict=True) if not by]


def warning_of_unwired(guide: str) -> str:
    return _of(
        guide,
        "L_r does not reach the student: its gradient for the CLS token is zero, so the regulariser's head learns and "
        f"the encoder does not. The head must be given CLS as block {setting('layer', guide)} puts it out, not "
        "detached",
    )


UNUSED = (
    "the clips have external embeddings, but objective.regularisation_weight is 0: nothing is learned from them. The "
    "paper needs five times the steps without; set the weight, or leave the embeddings out"
)


# ---------------------------------------------------------------- while it trains


class GuidanceCheck:
    """Warns when L_r, in the mean over the last ``window`` updates, is hardly better than the constant prediction's and
    not falling.

    Args:
        constant: the constant prediction's L_r, reduced as the run's.
        after: updates before which nothing is said.
        guide: whose L_r it is.
    """

    def __init__(self, constant: float, *, after: int, window: int, guide: str = "") -> None:
        self._constant, self._after, self._window, self._guide = constant, after, window, guide
        self._last: deque[float] = deque(maxlen=2 * window)
        self._warned = False

    def explained(self, regularisation: float) -> float:
        """The share of what the constant prediction leaves that this L_r does not."""
        return 1 - regularisation / self._constant

    def update(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """Take in the updates in ``rows``; the warning that is due, once until L_r recovers."""
        warnings, guide = [], self._guide
        for row in rows:
            if row.get(column("regularisation_weight", guide)) == 0:  # a schedule's end
                self._last.clear()
                continue
            self._last.append(row[column("regularisation", guide)])
            if row["step"] < self._after or len(self._last) < 2 * self._window:
                continue
            values = list(self._last)
            before, now = fmean(values[: self._window]), fmean(values[self._window :])
            explained = self.explained(now)
            if explained > FOLLOWED[1]:
                self._warned = False
            elif explained < FOLLOWED[0] and now > FALLING * before and not self._warned:
                self._warned = True
                warnings.append(
                    f"the student does not follow the guide: L_r is {now:.4g} at step {row['step']}, and predicting "
                    f"the same for every clip would get {self._constant:.4g}. Are the embeddings those of these clips? "
                    f"Else try a larger {setting('weight', guide)}, or a later {setting('layer', guide)} (0: the last)"
                )
        return warnings
