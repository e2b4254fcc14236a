"""Probes that are trained with PyTorch, on tokens or on all layers: attention pooling and the convex gated probe.

Every random number comes from a seed and so does the order of the clips: on the CPU the same features give the same
scores, bit for bit. Training goes on until the validation split gains nothing more; that split also chooses the
setting, and the test split is scored once, with it. Tokens are read batch by batch.

Shapes: B clips of a batch, n clips, C classes, H rows of patches in time, Y layers, D width, E pooled width, K
prototypes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cat.evaluation.classifiers import Candidate, Result, Split, choose, metric_of
from cat.evaluation.features import Features, Tokens

BATCH = 64  # clips
MAX_STEPS = 2000
PATIENCE = 8  # evaluations on valid without a gain: of the metric, or of LOSS_GAIN of the loss
LOSS_GAIN = 0.02
RATES = (1e-3, 1e-2)  # of learning
GATE_RATE = 1e-2  # at least; the gates start equal and have a long way to go
WEIGHT_DECAY = 0.05
PROTOTYPES = 512
DROPOUT = 0.2  # of the similarities with prototypes, as the authors have it

Inputs = Callable[[Features, np.ndarray], tuple[Tensor, ...]]  # of some clips, for a module


def attention_probe(
    train: Split,
    valid: Split,
    test: Split,
    *,
    multi_label: bool,
    seed: int = 0,
    device: torch.device | str = "cpu",
    prototypes: int = PROTOTYPES,
) -> Result:
    """A learned query over the rows of patches of the last layer, then logistic regression.

    Tokens are standardised with the training split's mean and deviation of each dimension. A row x of a clip weighs
    softmax(q . x / sqrt(D)), and the weighted mean goes through a linear layer; with q = 0 that is the linear probe on
    the mean. The learning rate is chosen on valid. ``prototypes`` is for the gated probe, which is called alike.
    """
    tokens = tokens_of(train)
    mean_D, deviation_D = (moment[-1] for moment in _moments(tokens))

    def inputs(features: Features, clips: np.ndarray) -> tuple[Tensor, ...]:
        rows_BHD, own_BH, _ = _tokens(features).batch(clips, layer=-1)
        return (rows_BHD - mean_D) / deviation_D, own_BH

    def build() -> nn.Module:
        return AttentionPooling(tokens.width, train.targets.shape[1])

    setups = [Setup(f"lr={rate:g}", build, inputs, rate) for rate in RATES]
    return choose([fit(setup, train, valid, test, multi_label, seed, device) for setup in setups], multi_label)


def gated_probe(
    train: Split,
    valid: Split,
    test: Split,
    *,
    multi_label: bool,
    seed: int = 0,
    device: torch.device | str = "cpu",
    prototypes: int = PROTOTYPES,
) -> Result:
    """The convex gated probe (Ghaffari et al., arXiv 2602.16305): a classifier on one convex combination of all layers,
    whose weights, the softmax of Y learned numbers, say which layers matter (`Result.gates`).

    Two heads are tried, and valid chooses between them as it chooses the learning rate:

    - "K prototypes", the paper's: CLS and the tokens of each layer get length 1; their combination is compared with K
      learned prototypes of length 1, and a linear layer reads of each prototype its least and its greatest similarity
      among the tokens, and that of CLS, with dropout.
    - "linear", its linear form: the combination of the layers' pooled embeddings through a linear layer. Each layer is
      standardised with the training split's moments: with gates of 0 and 1 it is the linear probe of one layer.

    This follows the authors' published code and summaries of the paper; the paper's own text could not be read.
    Different here: a token is a row of patches, the mean over frequency; a layer's tokens lose their mean over the
    training split before they get length 1 (those of a post-norm model all point nearly the same way); 512 prototypes
    by default, not 10,000; layer 0, what the first block sees, is one of the layers; the linear form is standardised;
    the learning rate is constant, and training ends by the validation split and not after a fixed number of steps; the
    loss is cross entropy for one label a clip and binary for several, unweighted.
    """
    check_prototypes(prototypes)
    tokens, pooled_BYE = tokens_of(train), train.features.pooled
    layers, classes = tokens.layers, train.targets.shape[1]
    mean_YE = pooled_BYE.mean(axis=0, dtype=np.float64).astype(np.float32)
    deviation_YE = _without_zeros(pooled_BYE.std(axis=0, dtype=np.float64)).astype(np.float32)
    rows_mean_YD, _ = _moments(tokens)
    cls_mean_YD = torch.from_numpy(tokens.cls_BYD.mean(axis=0, dtype=np.float32))

    def pooled(features: Features, clips: np.ndarray) -> tuple[Tensor, ...]:
        return (torch.from_numpy((features.pooled[clips] - mean_YE) / deviation_YE),)  # type: ignore[index]

    def directions(features: Features, clips: np.ndarray) -> tuple[Tensor, ...]:
        rows_BHYD, own_BH, cls_BYD = _tokens(features).batch(clips)
        return F.normalize(rows_BHYD - rows_mean_YD, dim=-1), own_BH, F.normalize(cls_BYD - cls_mean_YD, dim=-1)

    def linear() -> nn.Module:
        return GatedLinear(layers, mean_YE.shape[1], classes)

    def similarities() -> nn.Module:
        return GatedPrototypes(layers, tokens.width, classes, prototypes)

    setups = [Setup(f"linear, lr={rate:g}", linear, pooled, rate) for rate in RATES]
    setups += [Setup(f"{prototypes} prototypes, lr={rate:g}", similarities, directions, rate) for rate in RATES]
    return choose([fit(setup, train, valid, test, multi_label, seed, device) for setup in setups], multi_label)


TRAINED: dict[str, Callable[..., Result]] = {"attention": attention_probe, "gated": gated_probe}


def check_prototypes(count: int) -> None:
    if count < 1:
        raise ValueError(f"prototypes is {count}; expected at least 1 ({PROTOTYPES} by default, 10,000 in the paper)")


def tokens_of(split: Split) -> Tokens:
    return _tokens(split.features)


def _tokens(features: Features) -> Tokens:
    if features.tokens is None:
        raise ValueError("this probe reads tokens; expected features with them (Wanted(layers, tokens=True))")
    return features.tokens


def _moments(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Mean and deviation of every layer's rows of patches, (Y, D) float32 each, some rows at a time."""
    rows = tokens.rows_NYD
    parts = [rows[at : at + 512] for at in range(0, len(rows), 512)]
    mean_YD = sum(part.sum(axis=0, dtype=np.float64) for part in parts) / len(rows)
    variance_YD = sum(np.square(part - mean_YD).sum(axis=0) for part in parts) / len(rows)
    deviation_YD = _without_zeros(np.sqrt(variance_YD))
    return torch.from_numpy(mean_YD.astype(np.float32)), torch.from_numpy(deviation_YD.astype(np.float32))


def _without_zeros(deviation: np.ndarray) -> np.ndarray:
    """1 where nothing varies, as layer 0's CLS does not."""
    return np.where(deviation > 1e-6, deviation, 1.0)


# ---------------------------------------------------------------- modules


class AttentionPooling(nn.Module):
    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.query_D = nn.Parameter(0.02 * torch.randn(width))
        self.linear = nn.Linear(width, classes)

    def forward(self, rows_BHD: Tensor, own_BH: Tensor) -> Tensor:
        logits_BH = (rows_BHD @ self.query_D) / math.sqrt(rows_BHD.shape[-1])
        weights_BH = logits_BH.masked_fill(~own_BH, -torch.inf).softmax(dim=1)
        return self.linear((weights_BH[:, :, None] * rows_BHD).sum(dim=1))


class Gates(nn.Module):
    """Convex combination along the layers: weights >= 0 whose sum is 1."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.logits_Y = nn.Parameter(torch.zeros(layers))

    def weights(self) -> Tensor:
        return self.logits_Y.softmax(dim=0)

    def forward(self, x_XYD: Tensor) -> Tensor:
        return torch.einsum("...yd,y->...d", x_XYD, self.weights())


class GatedLinear(nn.Module):
    def __init__(self, layers: int, width: int, classes: int) -> None:
        super().__init__()
        self.gates = Gates(layers)
        self.linear = nn.Linear(width, classes)

    def forward(self, pooled_BYE: Tensor) -> Tensor:
        return self.linear(self.gates(pooled_BYE))


class GatedPrototypes(nn.Module):
    def __init__(self, layers: int, width: int, classes: int, prototypes: int) -> None:
        super().__init__()
        self.gates = Gates(layers)
        self.prototypes_KD = nn.Parameter(0.02 * torch.randn(prototypes, width))
        self.dropout = nn.Dropout(DROPOUT)
        self.linear = nn.Linear(3 * prototypes, classes)

    def forward(self, rows_BHYD: Tensor, own_BH: Tensor, cls_BYD: Tensor) -> Tensor:
        unit_KD = F.normalize(self.prototypes_KD, dim=1)
        similarity_BHK = F.linear(self.gates(rows_BHYD), unit_KD)
        outside_BH1 = ~own_BH[:, :, None]
        least_BK = similarity_BHK.masked_fill(outside_BH1, torch.inf).amin(dim=1)
        greatest_BK = similarity_BHK.masked_fill(outside_BH1, -torch.inf).amax(dim=1)
        seen = [least_BK, F.linear(self.gates(cls_BYD), unit_KD), greatest_BK]
        return self.linear(self.dropout(torch.cat(seen, dim=1)))


# ---------------------------------------------------------------- training


@dataclass(frozen=True)
class Setup:
    """A module, what it reads, and how it is trained."""

    setting: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    rate: float


def fit(
    setup: Setup, train: Split, valid: Split, test: Split, multi_label: bool, seed: int, device: torch.device | str
) -> Candidate:
    """Trains with AdamW until valid gains nothing more, and goes back to where it was best: by the metric, and among
    equals by the mean loss."""
    device = torch.device(device)
    metric, loss_of = metric_of(multi_label), F.binary_cross_entropy if multi_label else _cross_entropy
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if device.type == "cuda" else []):
        torch.manual_seed(seed)
        module = setup.build().to(device)
        predict = _Predict(setup, module, train, multi_label, device)
        optimizer = torch.optim.AdamW(_groups(module, setup.rate), lr=setup.rate)
        interval = min(100, max(10, math.ceil(len(train.targets) / BATCH)))
        best, state, steps, waited, lowest = (-math.inf, -math.inf), copy.deepcopy(module.state_dict()), 0, 0, math.inf
        for step, clips in enumerate(_batches(len(train.targets), seed), start=1):
            _step(module.train(), optimizer, setup.inputs(train.features, clips), train.targets[clips], multi_label)
            if step % interval:
                continue
            scores = predict(valid.features)
            loss = loss_of(torch.from_numpy(scores), torch.from_numpy(valid.targets).double()).item()
            reached, waited = (metric(scores, valid.targets), -loss), waited + 1
            if reached[0] > best[0] or loss < (1 - LOSS_GAIN) * lowest:
                lowest, waited = min(loss, lowest), 0
            if reached > best:
                best, state, steps = reached, copy.deepcopy(module.state_dict()), step
            if waited == PATIENCE or step >= MAX_STEPS:
                break
        module.load_state_dict(state)
    gates = module.gates.weights().tolist() if isinstance(module, GatedLinear | GatedPrototypes) else None
    return Candidate(f"{setup.setting}, {steps} steps", predict, valid, test, gates)


def _groups(module: nn.Module, rate: float) -> list[dict[str, object]]:
    gates = [parameter for name, parameter in module.named_parameters() if name.startswith("gates.")]
    others = [parameter for name, parameter in module.named_parameters() if not name.startswith("gates.")]
    groups: list[dict[str, object]] = [{"params": others, "weight_decay": WEIGHT_DECAY}]
    return [*groups, {"params": gates, "weight_decay": 0.0, "lr": max(rate, GATE_RATE)}] if gates else groups


def _step(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: tuple[Tensor, ...],
    targets_BC: np.ndarray,
    multi_label: bool,
) -> None:
    device = next(module.parameters()).device
    logits_BC = module(*(part.to(device) for part in inputs))
    wanted_BC = torch.from_numpy(targets_BC).to(device, torch.float32)
    if multi_label:
        loss = F.binary_cross_entropy_with_logits(logits_BC, wanted_BC)
    else:
        loss = F.cross_entropy(logits_BC, wanted_BC.argmax(dim=1))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _cross_entropy(scores_BC: Tensor, targets_BC: Tensor) -> Tensor:
    return -(scores_BC.clamp(min=1e-12).log() * targets_BC).sum(dim=1).mean()


def _batches(count: int, seed: int) -> Iterator[np.ndarray]:
    """Places of the training clips for ever, each epoch in an order of its own."""
    epoch = 0
    while True:
        order = np.random.default_rng((seed % (1 << 32), epoch)).permutation(count)
        yield from (order[at : at + BATCH] for at in range(0, count, BATCH))
        epoch += 1


@dataclass(frozen=True)
class _Predict:
    """Probabilities (n, C) float64, some clips at a time; a class that training lacks is never predicted."""

    setup: Setup
    module: nn.Module
    train: Split
    multi_label: bool
    device: torch.device

    @torch.no_grad()
    def __call__(self, features: Features) -> np.ndarray:
        self.module.eval()
        unseen_C = torch.from_numpy(~self.train.targets.any(axis=0)).to(self.device)
        parts = []
        for clips in np.array_split(np.arange(len(features.indices)), math.ceil(len(features.indices) / BATCH)):
            inputs = self.setup.inputs(features, clips)
            logits_BC = self.module(*(part.to(self.device) for part in inputs)).masked_fill(unseen_C, -torch.inf)
            parts.append(logits_BC.sigmoid() if self.multi_label else logits_BC.softmax(dim=1))
        return torch.cat(parts).double().cpu().numpy()
