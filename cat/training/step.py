"""One optimiser step of pre-training: losses, their descent, the teacher's average.

Nothing here waits for the device. The step runs eager, compiled in part or whole, or as one CUDA graph.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal, cast

import torch
from torch import Tensor, nn

from cat.distributed import Processes, current
from cat.model import CAT, PretrainOutput
from cat.parts import part
from cat.training.descent import LOW, Descent
from cat.training.optim import OptimConfig, build_optimizer, set_learning_rate, trainable
from cat.training.parallel import at_hand, gathering, is_sharded, local, replicated, shard
from cat_kernels import ema_update_

COMPILER = "inductor"  # torch.compile's backend
# What the model takes of a piece of the batch: spectrograms, visible patches, embeddings, noise, rows of other guides.
Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor, Mapping[str, Tensor]]
EAGER_STEPS = 3  # before a step is recorded: kernels are compiled, plans and tables made, moments allocated


class PretrainStep:
    """A model with its optimiser; a call is one update.

    Args:
        precision: "bf16" and "fp16" run under autocast, and the teacher keeps weights in it; "fp16" with scaled losses.
        compile: "blocks": torch.compile of the stems, of each block (compiled once, run many times) and of the decoder;
            "step": of the whole loss. The optimiser and the average are single kernels already.
        cuda_graph: record the whole step at its fourth call and replay it from then on; batches must keep their shapes.
        pieces: as how many pieces a batch is computed, by all processes together.
        world: the processes that train the model together.
        parallel: how; with "fsdp" each is left a shard of student and teacher alike.
    """

    def __init__(
        self,
        model: CAT,
        optim: OptimConfig,
        *,
        precision: Literal["fp32", "bf16", "fp16"] = "fp32",
        compile: Literal["none", "blocks", "step"] = "none",
        cuda_graph: bool = False,
        pieces: int = 1,
        world: Processes | None = None,
        parallel: Literal["ddp", "fsdp"] = "ddp",
    ) -> None:
        self.model = model
        self._pieces, self._world = pieces, world or current()
        self.device = model.student.cls.device
        if parallel == "fsdp" and self._world.several:
            shard(model, self._world, blocks=[*model.student.blocks, *model.teacher.blocks])
        self.parameters = trainable(model)
        self.optimizer = build_optimizer(self.parameters, optim, capturable=cuda_graph)
        self.descent = Descent(self.optimizer, self.parameters, optim.clip_norm, precision=precision)
        self._low = LOW.get(precision)
        if not is_sharded(model):  # then a rounded copy would have to be gathered beside the average
            if self._low is not None:
                model.lower_teacher(self._low)
            model.ema()  # before anything is compiled for the tensors as they are
        if compile == "blocks":
            compile_blocks(model)
        self._forward = cast(nn.Module, torch.compile(model, backend=COMPILER)) if compile == "step" else model
        self._decay: float | Tensor = 1.0
        # Tensors, that neither a graph nor a compiled loss has the number in it; none where it is always the same.
        self._weights = {
            name: torch.zeros((), device=self.device) for name, term in model.terms.items() if term.scheduled
        }
        self._guides = tuple(model.regularisers)
        self._replay: Replay | None = None
        self.whole = True  # False after an error between two parts of an update: the weights fit no step
        if cuda_graph:
            self._decay = torch.ones((), dtype=torch.float64, device=self.device)
            self._replay = Replay(self._recorded, self.device)

    def losses(
        self,
        spec: Tensor,
        visible: Tensor,
        embedding: Tensor | None,
        rng: Tensor,
        guides: Mapping[str, Tensor | None] | None = None,
        weights: Mapping[str, Tensor] | None = None,
        *,
        parts: float = 1.0,
        trained: bool = False,
    ) -> PretrainOutput:
        """As `CAT.forward`, in the step's precision. ``trained``: for a backward that all processes do together."""
        module = self._trained if trained else self._forward
        with torch.autocast(self.device.type, self._low, enabled=self._low is not None), part("forward, rest"):
            return module(spec, visible, embedding, rng=rng, guides=guides, weights=weights, parts=parts)

    @functools.cached_property
    def _trained(self) -> nn.Module:
        """Made at the first update, when the weights are those that the run begins or goes on with."""
        return replicated(self._forward, self._world)

    def __call__(
        self,
        spec: Tensor,
        visible: Tensor,
        embedding: Tensor | None,
        rng: Tensor,
        guides: Mapping[str, Tensor] | None = None,
        *,
        lr: float,
        decay: float,
        weights: Mapping[str, float] | None = None,
    ) -> Tensor:
        """One update on a whole batch, see `of_pieces`."""
        return self.of_pieces([(spec, visible, embedding, rng, guides or {})], lr=lr, decay=decay, weights=weights)

    def of_pieces(
        self, pieces: Iterable[Inputs], *, lr: float, decay: float, weights: Mapping[str, float] | None = None
    ) -> Tensor:
        """One update on this process's pieces of a batch, one after the other; the weights of the terms of L_r that
        have a schedule are needed, by the terms' names.

        Returns `PretrainOutput.numbers` of the whole batch (deviations: the mean of those of its pieces) and
        `Descent.numbers`, (7,) float32 without other guides or "fp16"; the next call may overwrite them.
        """
        set_learning_rate(self.optimizer, lr)
        if isinstance(self._decay, Tensor):
            self._decay.fill_(decay)
        else:
            self._decay = decay
        for name, held in self._weights.items():
            if weights is None or name not in weights:
                raise ValueError(f"weights has no {name!r}; expected the value of this term, since it has a schedule")
            held.fill_(weights[name])
        if self._replay is not None:
            ((spec, visible, embedding, rng, guides),) = pieces
            return self._replay(spec, visible, embedding, rng, *(guides.get(name) for name in self._guides))
        return self._update(pieces)

    def _recorded(
        self, spec: Tensor, visible: Tensor, embedding: Tensor | None, rng: Tensor, *rows: Tensor | None
    ) -> Tensor:
        """Of tensors alone, as a CUDA graph wants it."""
        guides = {name: row for name, row in zip(self._guides, rows, strict=True) if row is not None}
        return self._update([(spec, visible, embedding, rng, guides)])

    def _update(self, pieces: Iterable[Inputs]) -> Tensor:
        own = self._pieces // self._world.size
        told: list[list[Tensor]] = []
        for i, (spec, visible, embedding, rng, guides) in enumerate(pieces, start=1):
            with gathering(self._trained, last=i == own):
                output = self.losses(
                    spec, visible, embedding, rng, guides, self._weights, parts=self._pieces, trained=True
                )
                self.descent.backward(output.loss if own == 1 else output.loss / own)
            told.append([value.detach().float() for value in output.numbers])
        with part("optimiser"):
            numbers = self._of_all(told)  # with the others, before the weights move
            self.whole = False
            descended = self.descent.step()
        with part("EMA"):
            self._update_teacher()
        self.whole = True
        return torch.stack([*numbers, *(value.float() for value in descended)])

    def _update_teacher(self) -> None:
        if not is_sharded(self.model):
            self.model.update_teacher(self._decay)
            return
        # Sharded alike, the average is taken shard by shard. What else a teacher has is constant.
        teacher, student = local(self.model.teacher.parameters()), local(self.model.student.parameters())
        ema_update_(teacher, student, self._decay, backend=self.model.config.backend)

    def scoring(self) -> contextlib.AbstractContextManager[None]:
        """For evaluations: each process may compute other batches, or none."""
        return at_hand(self.model)

    def _of_all(self, pieces: list[list[Tensor]]) -> list[Tensor]:
        """The mean of the numbers of all pieces, in whatever process."""
        if self._pieces == 1:
            return pieces[0]
        return list(self._world.mean_(torch.stack([torch.stack(numbers) for numbers in pieces]).mean(0)))


def compile_blocks(model: CAT, backend: str | None = None) -> None:
    """torch.compile of the stems, of each block and of the decoder, in place; state dicts stay as they are."""
    parts: list[nn.Module] = [model.decoder]
    for encoder in (model.student, model.acting_teacher):
        parts += [encoder.stem, *encoder.blocks]
    for module in parts:
        module.compile(dynamic=False, backend=backend or COMPILER)


# ---------------------------------------------------------------- CUDA graphs


class Replay:
    """A function of tensors that is recorded once and then replayed.

    The first calls run it as it is, on a side stream, as CUDA's libraries want it before recording. Then it is
    recorded, which runs nothing, on copies of its arguments. From then on a call copies its arguments into these and
    replays. Whatever else the function reads must be a tensor that stays where it is.
    """

    def __init__(self, function: Callable[..., Tensor], device: torch.device) -> None:
        self._function, self._device = function, device
        self._calls = 0
        self._side: torch.cuda.Stream | None = None
        self._held: list[Tensor | None] = []
        self._run: Callable[[], Tensor] | None = None

    def __call__(self, *arguments: Tensor | None) -> Tensor:
        self._calls += 1
        if self._calls <= EAGER_STEPS:
            with self._side_stream():
                return self._function(*arguments)
        if self._run is None:
            self._held = [None if a is None else a.clone() for a in arguments]
            self._run = record(lambda: self._function(*self._held), self._device)
        for held, argument in zip(self._held, arguments, strict=True):
            if held is not None and argument is not None:
                if held.shape != argument.shape:
                    raise ValueError(
                        f"a batch of shape {tuple(argument.shape)} came after the step was recorded with "
                        f"{tuple(held.shape)}; a CUDA graph needs the same shapes: use run.cuda_graph=false"
                    )
                held.copy_(argument)
        with part("graph"):
            return self._run()

    @contextlib.contextmanager
    def _side_stream(self) -> Iterator[None]:
        current = torch.cuda.current_stream(self._device)
        self._side = self._side or torch.cuda.Stream(self._device)
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            yield
        current.wait_stream(self._side)


def record(function: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """``function`` as a CUDA graph; the returned callable replays it, with its result always in the same memory."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    # thread_local: the thread that pins batches goes on allocating meanwhile.
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        output = function()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay
