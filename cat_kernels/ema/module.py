"""`EMA`: the moving average of a module, kept from step to step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..backends import resolve
from .op import OPERATOR, _check_decay, _forward
from .watch import Watch, adopt, agree

if TYPE_CHECKING:
    from .kernels import Table

FULL = (torch.float32, torch.float64)


class EMA:
    """The teacher's parameters follow the student's: teacher <- decay * teacher + (1 - decay) * student.

        ema = EMA(teacher, student)
        ...
        optimizer.step()
        ema.update(0.9998)

    Floating-point parameters that require gradients in the student are averaged. Everything else is copied as it is:
    frozen parameters, all buffers.

    teacher: the module that computes, of the same names and shapes as the student; it must not require gradients. Its
        float32 (float64) parameters are averaged in place. One in bf16 or fp16 is a rounded copy, written in the same
        pass, of a float32 average that is held here; it starts at the teacher's value.
    copy_dtype: round the teacher's floating-point parameters to this dtype now, and hold their averages here.
    masters: a module of the same names that holds the averages instead, where the teacher has a rounded copy; it may
        share its other parameters with the teacher.
    backend: "auto", "triton" or "torch".

    Every update compares names, shapes, dtypes and addresses of all modules' tensors with those of the last one.
    Tensors that have moved, and parameters frozen or unfrozen, are followed; a parameter that was added, removed,
    reshaped or changed its dtype is a ValueError that names it. What somebody else wrote into the teacher since then,
    `load_state_dict` or an initialisation, is where the average goes on from: for a rounded copy at the elements that
    are no longer the average's. Not seen is what PyTorch does not count as a change, `parameter.data.copy_(...)`: call
    `load_state_dict` here instead. A captured CUDA graph replays on the tensors of its capture, unchecked.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        *,
        copy_dtype: torch.dtype | None = None,
        masters: nn.Module | None = None,
        backend: str = "auto",
    ) -> None:
        if copy_dtype is not None and not (copy_dtype.is_floating_point and copy_dtype not in FULL):
            raise ValueError(
                f"EMA: copy_dtype={copy_dtype} must be a low-precision dtype, such as torch.bfloat16, or None for a "
                "teacher that computes in float32"
            )
        if copy_dtype is not None and masters is not None:
            raise ValueError("EMA: copy_dtype makes averages and masters brings them; give one of the two")
        self.teacher, self.student, self.backend = teacher, student, backend
        self._masters = masters
        self._seen: list[Any] | None = None
        self._watch = Watch([])
        self._modules = {"teacher": teacher, "student": student}
        if masters is not None:
            self._modules["masters"] = masters
        self._held: dict[str, Tensor] = {}  # averages of the parameters that are low, where no module holds them
        parameters = {name: p for name, p in teacher.named_parameters() if p.is_floating_point()}
        if masters is None:
            for name, tensor in parameters.items():
                if copy_dtype is not None or tensor.dtype not in FULL:
                    full = tensor.dtype if tensor.dtype in FULL else torch.float32
                    self._held[name] = tensor.detach().to(full, copy=True)
        self._described = {label: _describe(module) for label, module in self._modules.items()}
        self._check_names()
        self._follow()
        if copy_dtype is not None:  # now that nothing is wrong with the modules
            for tensor in parameters.values():
                tensor.data = tensor.data.to(copy_dtype)
            self._described["teacher"] = _describe(teacher)
            self._follow()

    @torch.no_grad()
    def update(self, decay: float | Tensor) -> None:
        """Average once. decay: in [0, 1]; a float, or a 0-dim float64 tensor on the CPU or, for CUDA graphs, on the
        parameters' device (its range is then not checked). Raises ValueError or TypeError."""
        self._catch_up()
        if self._average:
            decay = _check_decay(decay, self._average[0])
            if self._table is None:
                _forward(self._average, self._from, decay, [])
            else:
                self._table.run(decay)
                rest = self._table.rest
                _forward([self._average[i] for i in rest], [self._from[i] for i in rest], decay, [])
        self._copy(self._exact)
        self._copy(self._rounded)
        if self._table is not None:
            torch.autograd.graph.increment_version(self._written)
        self._watch.settle()

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the averages into the teacher anew, whatever it holds, after something else than `update` set them."""
        self._follow()
        self._copy(self._pairs)
        self._watch.settle()

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """The averages of the teacher's floating-point parameters, by name; the tensors themselves, not copies."""
        self._catch_up()
        return self._averages()

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Set the averages, and their rounded copies. Names and shapes must be those of `state_dict`."""
        own = self._averages()
        _check_same("the state", _shapes(state), "those of this EMA", _shapes(own), _LOAD)
        for name, tensor in own.items():
            tensor.copy_(state[name])
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        """Without the plan, which is about the tensors of this one."""
        with torch.no_grad():
            self._catch_up()
        return {name: value for name, value in self.__dict__.items() if name not in _PLAN}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._follow()

    def _averages(self) -> dict[str, Tensor]:
        parameters = dict(self.teacher.named_parameters())
        return {n: self._master(n, p).detach() for n, p in parameters.items() if p.is_floating_point()}

    def _master(self, name: str, parameter: Tensor) -> Tensor:
        if self._masters is not None:
            return self._masters.get_parameter(name)
        return self._held.get(name, parameter)

    def _copy(self, pairs: tuple[list[Tensor], list[Tensor]]) -> None:
        if pairs[0]:
            torch._foreach_copy_(*pairs)

    def _catch_up(self) -> None:
        """Take in what happened to the modules since the last update."""
        seen = [_fingerprint(module) for module in self._modules.values()]
        if self._seen == seen and self._watch.untouched():
            return
        watch = self._watch
        averages = watch.written_averages()
        self._follow()
        before, now = watch.marks(), self._watch.marks()
        if self._masters is not None:  # averages that are held here move with the teacher, and nobody else moves them
            averages = {name for name in now if before[name][1] != now[name][1]}
        for name, parameter, average in self._watch.watched:
            if before[name][0] == now[name][0] or _lie_together(parameter, average):
                continue
            if name not in averages:
                adopt(parameter, average)
            elif not agree(parameter, average):
                self._seen, self._watch = None, watch  # said again until it is settled
                raise ValueError(
                    f"EMA: {name} was changed in the teacher and in its average since the last update, to different "
                    "values; call refresh() to go on from the averages, or load_state_dict() to set them"
                )
        self._watch.settle()

    def _follow(self) -> None:
        """Plan the update on the tensors that the modules have now."""
        self._seen = None  # until the plan is whole
        described = {label: _describe(module) for label, module in self._modules.items()}
        for label, now in described.items():
            _check_same(f"the {label}", now, "what it had when this EMA was made", self._described[label], _CHANGED)
        students = dict([*self.student.named_parameters(), *self.student.named_buffers()])
        self._average: list[Tensor] = []
        self._from: list[Tensor] = []
        copies: list[Tensor | None] = []
        exact: list[tuple[Tensor, Tensor]] = []
        rounded: list[tuple[Tensor, Tensor]] = []
        low_pairs: list[tuple[Tensor, Tensor]] = []
        watched: list[tuple[str, Tensor, Tensor]] = []
        device: torch.device | None = None
        for name, teacher in self.teacher.named_parameters():
            student = students[name]
            if name in self._held:
                self._held[name] = _moved(self._held[name], teacher)
            master = self._master(name, teacher)
            low: Tensor | None = None if _lie_together(master, teacher) else teacher
            self._check_parameter(name, teacher, student, master)
            if teacher.is_floating_point() and (name in self._held or self._masters is not None):
                watched.append((name, teacher, master))
            averaged = student.requires_grad and student.is_floating_point()
            if averaged:
                device = device or master.device
                if master.device != device:
                    raise ValueError(
                        f"EMA: {name} is on {master.device} and parameters before it on {device}; make one EMA for the "
                        "submodules of each device"
                    )
                self._average.append(master)
                self._from.append(student)
                copies.append(low)
            elif not _lie_together(master, student):
                exact.append((master, student))
            if low is not None:
                low_pairs.append((low, master))
                rounded += [] if averaged else [(low, master)]
        holders = [self.teacher] if self._masters is None else [self.teacher, self._masters]
        buffers = [pair for holder in holders for pair in holder.named_buffers()]
        exact += [(tensor, students[name]) for name, tensor in buffers if not _lie_together(tensor, students[name])]
        self._table: Table | None = None
        if self._average and resolve(OPERATOR, self.backend, self._average[0].device.type) == "triton":
            from .kernels import Table

            self._table = Table(self._average, self._from, copies)
            # PyTorch's share, and its copies.
            rounded += [(low, self._average[i]) for i in self._table.rest if (low := copies[i]) is not None]
        else:
            rounded = low_pairs
        self._exact, self._rounded, self._pairs = _unzip(exact), _unzip(rounded), _unzip(low_pairs)
        self._written = [*self._average, *(low for low in copies if low is not None)]
        self._watch = Watch(watched)
        self._seen = [_fingerprint(module) for module in self._modules.values()]

    def _check_names(self) -> None:
        shapes = {label: {n: what[:2] for n, what in found.items()} for label, found in self._described.items()}
        for label, found in shapes.items():
            _check_same(f"the {label}", found, "what the teacher has", shapes["teacher"], _DIFFERENT)

    def _check_parameter(self, name: str, teacher: Tensor, student: Tensor, master: Tensor) -> None:
        if teacher.requires_grad or master.requires_grad:
            raise ValueError(
                f"EMA: {name} of the teacher requires gradients, and it is not trained; call "
                "teacher.requires_grad_(False)"
            )
        if student.requires_grad and (_lie_together(master, student) or _lie_together(teacher, student)):
            raise ValueError(
                f"EMA: {name} is one tensor in teacher and student, which leaves nothing to average; make the teacher "
                "with copy.deepcopy(student)"
            )
        if master.is_floating_point() and master.dtype not in FULL:
            raise ValueError(
                f"EMA: {name} of masters is {master.dtype}; an average in low precision does not move: expected "
                "torch.float32"
            )
        for label, tensor in (("student", student), ("masters", master)):
            if tensor.device != teacher.device:
                raise ValueError(
                    f"EMA: {name} is on {teacher.device} in the teacher and on {tensor.device} in the {label}; move "
                    "the modules to one device"
                )


def _moved(average: Tensor, teacher: Tensor) -> Tensor:
    """On the teacher's device; an average on "meta" has no value, and starts at the teacher's."""
    if average.is_meta and not teacher.is_meta:
        return teacher.detach().to(average.dtype, copy=True)
    return average.to(teacher.device)


_PLAN = ("_seen", "_watch", "_average", "_from", "_table", "_exact", "_rounded", "_pairs", "_written")
_LOAD = "load what the state_dict() of an EMA of the same module gave"
_CHANGED = "make a new EMA after changing a module"
_DIFFERENT = "make the teacher with copy.deepcopy(student)"


def _fingerprint(module: nn.Module) -> tuple[list[str], list[Any]]:
    """What an update depends on. As fast as Python can: it is taken of every module at every update."""
    names: list[str] = []
    tensors: list[Tensor | None] = []
    modules: list[nn.Module | None] = [module]
    for found in modules:  # grows
        if found is not None:
            for members in (found._parameters, found._buffers):
                names.extend(members)
                tensors.extend(members.values())
            names.extend(found._modules)
            modules.extend(found._modules.values())
    facts = [t if t is None else (t.data_ptr(), t.shape, t.stride(), t.dtype, t.requires_grad) for t in tensors]
    return names, facts


def _describe(module: nn.Module) -> dict[str, tuple[str, tuple[int, ...], torch.dtype]]:
    named: Iterable[tuple[str, str, Tensor]] = [
        *((name, "parameter", t) for name, t in module.named_parameters()),
        *((name, "buffer", t) for name, t in module.named_buffers()),
    ]
    return {name: (kind, tuple(t.shape), t.dtype) for name, kind, t in named}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in tensors.items()}


def _check_same(label: str, found: Mapping[str, Any], wanted: str, expected: Mapping[str, Any], remedy: str) -> None:
    """The same names, with the same facts; the error names the first of each kind of difference, and counts them."""
    unknown = [name for name in found if name not in expected]
    missing = [name for name in expected if name not in found]
    changed = [name for name in expected if name in found and found[name] != expected[name]]
    said = [
        f"{what} {names[0]!r}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        for names, what in ((unknown, "has the unexpected"), (missing, "lacks"))
        if names
    ]
    if changed:
        name = changed[0]
        more = f" and {len(changed) - 1} more differ" if len(changed) > 1 else ""
        said.append(f"has {name!r} as {_told(found[name])}, expected {_told(expected[name])}{more}")
    if said:
        raise ValueError(f"EMA: {label} {', '.join(said)}; expected {wanted}: {remedy}")


def _told(fact: Any) -> str:
    return " ".join(str(part) for part in fact) if fact and isinstance(fact[0], str) else str(fact)


def _lie_together(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.device == b.device and a.data_ptr() == b.data_ptr() != 0)


def _unzip(pairs: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    return [a for a, _ in pairs], [b for _, b in pairs]
