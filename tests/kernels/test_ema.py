"""The moving average: its table of addresses, agreement with PyTorch's lerp, and what `EMA` follows and refuses."""

import copy
import pickle

import pytest
import torch
from torch import nn

from cat_kernels import EMA, backends, ema_update_
from cat_kernels.backends import BackendError
from cat_kernels.ema.spec import SPEC

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = [
    name for name in ("torch", "triton") if backends.why_not("ema_update_", name, DEVICE.type) is None
]  # a machine without Triton still tests the rest
pytestmark = pytest.mark.either
DECAYS = [0.0, 0.3, 0.5, 0.9, 0.9998, 1.0]

every_backend = pytest.mark.parametrize("backend", BACKENDS)
needs_triton = pytest.mark.skipif("triton" not in BACKENDS, reason="Triton does not run here")


def normal(*shapes, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g).to(DEVICE, dtype) for shape in shapes]


def clones(tensors):
    return [t.clone(memory_format=torch.preserve_format) for t in tensors]


def same(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0, equal_nan=True)


def same_rounded(actual, exact):
    """Rounded to nearest; Triton's interpreter cuts to bf16 instead."""
    for a, e in zip(actual, exact, strict=True):
        cut = (e.float().view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
        near = e.to(a.dtype)
        if DEVICE.type == "cpu" and a.dtype == torch.bfloat16:
            near = torch.where(a == cut, cut, near)
        same([a], [near])


def lerped(teacher, student, decay):
    """What PyTorch's own kernel gives."""
    result = clones(teacher)
    torch._foreach_lerp_(result, [s.to(t.dtype) for s, t in zip(student, teacher, strict=True)], 1.0 - decay)
    return result


# --- ema_update_ ------------------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's, of infinities
@pytest.mark.parametrize("on_device", [True, False])
@pytest.mark.parametrize("decay", DECAYS)
def test_agrees_with_lerp_to_the_last_bit(decay, on_device):
    from cat_kernels.ema import kernels

    shapes = [(100, 130), (37,), (3, 5, 7), (), (1,), (kernels.CHUNK,), (2 * kernels.CHUNK,)]
    teacher, student = normal(*shapes), normal(*shapes, seed=1)
    teacher[1][:2] = torch.tensor([torch.inf, torch.nan])
    student[1][1:4] = torch.tensor([-torch.inf, torch.nan, torch.inf])
    expected = lerped(teacher, student, decay)
    table = kernels.Table(teacher, student, [None] * len(shapes))
    assert len(table.launches) == 1
    if on_device:
        table.run(torch.tensor(decay, dtype=torch.float64, device=DEVICE))
    else:  # as for a decay on the CPU and tensors on a GPU
        kernels.launch_rows(table.launches[0], table.launches[0].rows, 1.0 - decay, False)
    same(teacher, expected)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision_student_and_copies(dtype):
    shapes = [(70, 71), (5,)]
    teacher, student = normal(*shapes), normal(*shapes, seed=1, dtype=dtype)
    copies = normal(*shapes, seed=2, dtype=dtype)
    expected = lerped(teacher, student, 0.9)
    ema_update_(teacher, student, 0.9, copies=copies, backend="triton")
    same(teacher, expected)
    same_rounded(copies, expected)


@needs_triton
def test_thousands_of_tensors_in_one_launch():
    from cat_kernels.ema import kernels

    shapes = [(i % 5,) for i in range(2500 if DEVICE.type == "cuda" else 250)]  # a program is slow in the interpreter
    teacher, student = normal(*shapes), normal(*shapes, seed=1)
    expected = lerped(teacher, student, 0.9)
    table = kernels.Table(teacher, student, [None] * len(shapes))
    assert [part.rows.shape for part in table.launches] == [(len(shapes) * 4 // 5, 4)]  # none for the empty ones
    table.run(torch.tensor(0.9, dtype=torch.float64))
    same(teacher, expected)


@needs_triton
def test_unaligned_tensors():
    from cat_kernels.ema import kernels

    teacher, student, low = normal((5001,)), normal((5001,), seed=1), normal((5001,), dtype=torch.bfloat16)
    for cut in (lambda t: t[1:], lambda t: t[8:]):
        t, s, c = ([cut(tensors[0])] for tensors in (clones(teacher), student, clones(low)))
        assert kernels.Table(t, s, c).launches[0].aligned == (t[0].data_ptr() % 16 == 0)
        expected = lerped(t, s, 0.9)
        ema_update_(t, s, 0.9, copies=c, backend="triton")
        same(t, expected)
        same_rounded(c, expected)


@needs_triton
def test_layouts():
    """Dense memory in one order is the kernel's; the rest goes to PyTorch."""
    from cat_kernels.ema import kernels

    last = [t.contiguous(memory_format=torch.channels_last) for t in normal((2, 3, 4, 5), (2, 3, 4, 5), seed=3)]
    plain = normal((2, 3, 4, 5), (6, 7), (6, 7), (12, 7), (4,), (4,))
    teacher = [last[0], plain[0], plain[1].T, plain[3][::2], plain[4].double(), plain[5]]
    student = [last[1], last[0].clone(), plain[2].T, plain[3][1::2], plain[4], plain[4].double()]
    table = kernels.Table(teacher, student, [None] * 6)
    assert table.rest == [1, 3, 4, 5]
    expected = [lerped([t], [s], 0.9)[0] for t, s in zip(teacher, student, strict=True)]
    ema_update_(teacher, student, 0.9, backend="triton")
    same(teacher, expected)


@every_backend
@pytest.mark.parametrize("decay", [0.9, torch.tensor(0.9, dtype=torch.float64, device=DEVICE)], ids=["float", "tensor"])
def test_a_tensor_that_comes_twice_is_averaged_twice(backend, decay):
    """On a GPU an operation on a list takes both at the same time."""
    teacher, student = normal((30,), (7,)), normal((30,), (7,), seed=1)
    expected = lerped(lerped(teacher, student, 0.9), student, 0.9)
    ema_update_([*teacher, teacher[0], teacher[1]], [*student, *student], decay, backend=backend)
    torch.testing.assert_close(teacher, expected, rtol=1e-6, atol=1e-7)


@needs_triton
def test_a_tensor_that_comes_twice_is_in_the_table_once():
    from cat_kernels.ema import kernels

    (teacher,), (student,) = normal((30,)), normal((30,), seed=1)
    assert kernels.Table([teacher] * 2, [student] * 2, [None] * 2).rest == [1]


@needs_triton
def test_dtypes_that_differ():
    from cat_kernels.ema import kernels

    shapes = [(kernels.CHUNK + 9,)] * 4
    teacher, student = normal(*shapes), normal(*shapes, seed=1)
    student[3] = student[3].half()
    low = [torch.zeros(shapes[0], dtype=dtype, device=DEVICE) for dtype in (torch.bfloat16, torch.float16)]
    copies = [None, *low, None]
    expected = lerped(teacher, student, 0.9)
    table = kernels.Table(teacher, student, copies)
    assert len(table.launches) == 3
    for part in table.launches:
        copies_at = part.rows[:, 2]
        assert not copies_at[copies_at < 1 << 16].any()  # where there is no copy, it is 0 in every chunk
    table.run(torch.tensor(0.9, dtype=torch.float64))
    same(teacher, expected)
    same_rounded(copies[1:3], expected[1:3])


@needs_triton
def test_tables_are_kept_and_followed():
    from cat_kernels.ema import kernels

    kernels._TABLES.clear()
    teacher, student = normal((8,), (9,)), normal((8,), (9,), seed=1)
    for _ in range(2):
        ema_update_(teacher, student, 0.9, backend="triton")
    assert len(kernels._TABLES) == 1
    student[0].data = student[0].data.clone() + 1
    expected = lerped(teacher, student, 0.9)
    ema_update_(teacher, student, 0.9, backend="triton")
    same(teacher, expected)
    assert len(kernels._TABLES) == 2
    for n in range(2 * kernels.KEPT):
        ema_update_(*(normal((n + 1,)) for _ in range(2)), 0.9, backend="triton")
    assert len(kernels._TABLES) == kernels.KEPT


@every_backend
def test_versions_count_the_writes(backend):
    teacher, student = normal((8,)), normal((8,))
    copies = normal((8,), dtype=torch.bfloat16)
    before = teacher[0]._version, copies[0]._version
    ema_update_(teacher, student, 0.9, copies=copies, backend=backend)
    assert teacher[0]._version > before[0]
    assert copies[0]._version > before[1]


@every_backend
def test_tensors_of_inference_mode(backend):
    """They have no version counters."""
    with torch.inference_mode():
        teacher, student = normal((8,)), normal((8,), seed=1)
        expected = lerped(teacher, student, 0.9)
        ema_update_(teacher, student, 0.9, backend=backend)
        torch.testing.assert_close(teacher, expected, rtol=1e-6, atol=1e-7)


@needs_triton
def test_registered_overload():
    for sample in list(SPEC.samples(DEVICE, torch.bfloat16))[:2]:
        for overload, arguments in SPEC.overload_calls(sample):
            checks = ("test_schema", "test_faketensor")
            torch.library.opcheck(overload, arguments, {"backend": "triton"}, test_utils=checks)


# --- EMA --------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.head = nn.Linear(7, 7, bias=False)
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("unsaved", torch.zeros(2), persistent=False)


def pair(**options):
    """A student a step away from its teacher, and the EMA between them."""
    torch.manual_seed(0)
    student = Net().to(DEVICE)
    teacher = copy.deepcopy(student).requires_grad_(False)
    ema = EMA(teacher, student, **options)
    step(student)
    return teacher, student, ema


def step(student):
    with torch.no_grad():
        for p in student.parameters():
            p += torch.randn_like(p)
        student.mask.logical_not_()
        student.unsaved += 1
        student.inner[1].num_batches_tracked += 1
        student.inner[1].running_mean.normal_()


def expect(average, student, decay=0.9):
    """What the averages must be after an update: {name: tensor}."""
    found = {}
    for name, p in student.named_parameters():
        old = average[name].clone()
        found[name] = lerped([old], [p.detach()], decay)[0] if p.requires_grad else p.detach().clone()
    return found


def assert_followed(teacher, student, expected):
    found = dict(teacher.named_parameters())
    same_rounded([found[n] for n in expected], expected.values())
    same(teacher.buffers(), student.buffers())


@every_backend
@pytest.mark.parametrize("copy_dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("on_device", [True, False])
def test_module(backend, copy_dtype, on_device):
    teacher, student, ema = pair(backend=backend, copy_dtype=copy_dtype)
    decay = torch.tensor(0.9, dtype=torch.float64, device=DEVICE) if on_device else 0.9
    for _ in range(3):
        expected = expect(ema.state_dict(), student)
        ema.update(decay)
        if on_device and DEVICE.type == "cuda" and backend == "torch":
            for name, average in ema.state_dict().items():  # differences, scaled and added: not lerp
                torch.testing.assert_close(average, expected[name])
        else:
            assert_followed(teacher, student, expected)
            same(ema.state_dict().values(), expected.values())
        step(student)
    assert all(p.dtype == (copy_dtype or torch.float32) for p in teacher.parameters())
    assert not any(p.requires_grad for p in teacher.parameters())


@needs_triton
def test_one_launch_though_copies_are_few():
    teacher, student, _ = pair()
    low = copy.deepcopy(teacher, {id(p): p for p in teacher.parameters() if p is not teacher.head.weight})
    low.head.weight.data = low.head.weight.data.bfloat16()
    ema = EMA(low, student, masters=teacher, backend="triton")
    assert len(ema._table.launches) == 1
    expected = expect(dict(teacher.named_parameters()), student)
    ema.update(0.9)
    assert_followed(teacher, student, expected)
    assert_followed(low, student, expected)
    assert low.head.weight.dtype == torch.bfloat16


@every_backend
def test_masters_are_rounded_anew(backend):
    teacher, student, _ = pair()
    low = copy.deepcopy(teacher).bfloat16()
    low.inner[1].float()
    ema = EMA(low, student, masters=teacher, backend=backend)
    expected = expect(dict(teacher.named_parameters()), student)
    ema.update(0.9)
    assert_followed(teacher, student, expected)
    teacher.load_state_dict({n: t + 1 for n, t in teacher.state_dict().items()})
    ema.refresh()
    same([low.head.weight], [teacher.head.weight.bfloat16()])


WRITES = {
    "load_state_dict": lambda m, state: m.load_state_dict(state),
    "assign": lambda m, state: m.load_state_dict(
        {n: t.to(m.state_dict()[n].dtype) for n, t in state.items()}, assign=True
    ),
    "copy_": lambda m, state: [p.copy_(state[n]) for n, p in m.named_parameters()],
    "init": lambda m, state: [(nn.init.zeros_(p), p.add_(state[n])) for n, p in m.named_parameters()],
    "data": lambda m, state: [setattr(p, "data", state[n].to(p.dtype)) for n, p in m.named_parameters()],
    "parameters": lambda m, state: [
        m.get_submodule(n.rpartition(".")[0]).register_parameter(
            n.rpartition(".")[2], nn.Parameter(state[n].to(p.dtype), requires_grad=p.requires_grad)
        )
        for n, p in list(m.named_parameters())
    ],
    "to and load": lambda m, state: m.to(memory_format=torch.channels_last).load_state_dict(state),
}


def other_state(module):
    """Values of the module's names that bfloat16 holds."""
    torch.manual_seed(7)
    return {n: torch.randn_like(t.float()).bfloat16().to(t.dtype) for n, t in module.state_dict().items()}


@every_backend
@pytest.mark.parametrize("copy_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("which", ["teacher", "student"])
@pytest.mark.parametrize("write", WRITES)
def test_what_others_write_counts(backend, copy_dtype, which, write):
    """A teacher, in full or low precision, and a student that are written between two updates."""
    teacher, student, ema = pair(backend=backend, copy_dtype=copy_dtype)
    ema.update(0.9)
    module = {"teacher": teacher, "student": student}[which]
    state = other_state(student)
    with torch.no_grad():
        WRITES[write](module, state)
    average = {n: t.clone() for n, t in ema.state_dict().items()}
    if which == "teacher":
        same(average.values(), [state[n] for n in average])
    expected = expect(average, student)
    ema.update(0.9)
    same(ema.state_dict().values(), expected.values())
    assert_followed(teacher, student, expected)


def test_only_what_changed_is_taken_from_a_rounded_copy():
    """The average keeps its precision where the copy is still the rounded average."""
    teacher, student, ema = pair(copy_dtype=torch.bfloat16)
    ema.update(0.9)
    before = {n: t.clone() for n, t in ema.state_dict().items()}
    teacher.load_state_dict(teacher.state_dict())
    teacher.head.weight.data = teacher.head.weight.data.clone()
    same(ema.state_dict().values(), before.values())
    with torch.no_grad():
        teacher.head.weight[0, 0] = 3.0
        teacher.scale.fill_(torch.nan)
    before["head.weight"][0, 0] = 3.0
    before["scale"].fill_(torch.nan)
    same(ema.state_dict().values(), before.values())
    teacher.load_state_dict(teacher.state_dict())  # NaN is NaN
    expected = expect(before, student)
    ema.update(0.9)
    same(ema.state_dict().values(), expected.values())


@pytest.mark.parametrize("which", ["teacher", "masters", "both"])
def test_writes_beside_masters(which):
    """Either of the two may be written; where both were and disagree, one has to say which counts."""
    masters, student, _ = pair()
    teacher = copy.deepcopy(masters).bfloat16()
    for layer in (teacher.inner[1], masters.inner[1]):
        layer.float()
    ema = EMA(teacher, student, masters=masters)
    ema.update(0.9)
    state = other_state(student)
    for label, module in (("teacher", teacher), ("masters", masters)):
        if which in (label, "both"):
            module.load_state_dict(state)
    expected = expect(state, student)
    ema.update(0.9)
    same(masters.parameters(), expected.values())
    same_rounded(teacher.parameters(), expected.values())
    teacher.load_state_dict(state)
    masters.load_state_dict({n: t + 1 for n, t in state.items()})
    for attempt in (ema.update, ema.update, lambda _: ema.state_dict()):
        with pytest.raises(ValueError, match=r"was changed in the teacher and in its average.*refresh"):
            attempt(0.9)
    ema.refresh()
    same([teacher.head.weight], [masters.head.weight.bfloat16()])
    expected = expect(dict(masters.named_parameters()), student)
    ema.update(0.9)
    same(masters.parameters(), expected.values())


def test_a_loaded_state_wins():
    teacher, student, ema = pair(copy_dtype=torch.bfloat16)
    ema.update(0.9)
    state = {n: t.clone() for n, t in ema.state_dict().items()}
    teacher.load_state_dict(other_state(student))
    ema.load_state_dict(state)
    same(ema.state_dict().values(), state.values())
    same([teacher.head.weight], [state["head.weight"].bfloat16()])
    ema.update(1.0)
    same([ema.state_dict()["head.weight"]], [state["head.weight"]])


@every_backend
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_of_an_ema_are_on_their_own(backend, how):
    teacher, student, ema = pair(backend=backend, copy_dtype=torch.bfloat16)
    ema.update(0.9)
    teacher.load_state_dict(other_state(student))  # seen in the copy too
    other = copy.deepcopy(ema) if how == "deepcopy" else pickle.loads(pickle.dumps(ema))
    assert other.teacher is not teacher
    before = {n: t.clone() for n, t in ema.state_dict().items()}
    same(other.state_dict().values(), before.values())
    expected = expect(before, other.student)
    other.update(0.9)
    same(other.state_dict().values(), expected.values())
    same(ema.state_dict().values(), before.values())
    with torch.no_grad():
        other.teacher.scale.fill_(5.0)
    assert other.state_dict()["scale"] == 5.0


@pytest.mark.parametrize("copy_dtype", [None, torch.bfloat16])
def test_modules_made_on_meta(copy_dtype):
    """An EMA that was made before its modules had values."""
    torch.manual_seed(0)
    good = Net()
    with torch.device("meta"):
        student, teacher = Net(), Net().requires_grad_(False)
        ema = EMA(teacher, student, copy_dtype=copy_dtype)
    for module in (student, teacher):
        module.to_empty(device=DEVICE)
        module.load_state_dict(good.state_dict())
    step(student)
    average = {n: t.clone() for n, t in ema.state_dict().items()}
    wanted = dict(good.to(DEVICE).named_parameters())
    same(average.values(), [wanted[n].detach().to(copy_dtype or torch.float32).float() for n in average])
    expected = expect(average, student)
    ema.update(0.9)
    same(ema.state_dict().values(), expected.values())


@every_backend
def test_the_default_device_does_not_matter(backend):
    _, student, ema = pair(copy_dtype=torch.bfloat16, backend=backend)
    expected = expect(ema.state_dict(), student)
    with torch.device("meta"):
        ema.update(0.9)
    same(ema.state_dict().values(), expected.values())


def test_parameters_of_inference_mode():
    with torch.inference_mode():
        _, student, ema = pair(copy_dtype=torch.bfloat16)
        expected = expect(ema.state_dict(), student)
        ema.update(0.9)
        same(ema.state_dict().values(), expected.values())


def test_rounding_keeps_the_exact_average():
    teacher, student, ema = pair(copy_dtype=torch.bfloat16)
    start = ema.state_dict()["head.weight"].clone()
    assert start.dtype == torch.float32
    assert not torch.equal(start, teacher.head.weight.float())
    for _ in range(20):
        ema.update(0.9999)  # each a step below the resolution of bf16
    moved = (ema.state_dict()["head.weight"] - start) / (student.head.weight - start)
    torch.testing.assert_close(moved, torch.full_like(moved, 1 - 0.9999**20), rtol=0.02, atol=0)


MOVES = {
    "data": lambda m: setattr(m.head.weight, "data", m.head.weight.data.clone()),
    "parameter": lambda m: setattr(
        m.head, "weight", nn.Parameter(m.head.weight.detach().clone(), requires_grad=m.head.weight.requires_grad)
    ),
    "assign": lambda m: m.load_state_dict({n: t.clone() for n, t in m.state_dict().items()}, assign=True),
    "layer": lambda m: setattr(m, "head", copy.deepcopy(m.head)),
    "buffer": lambda m: setattr(m, "mask", m.mask.clone()),
    "strides": lambda m: setattr(m.head.weight, "data", m.head.weight.data.T),
}


@every_backend
@pytest.mark.parametrize("which", ["teacher", "student"])
@pytest.mark.parametrize("move", MOVES)
def test_tensors_that_move_are_followed(backend, which, move):
    teacher, student, ema = pair(backend=backend)
    ema.update(0.9)
    step(student)
    MOVES[move]({"teacher": teacher, "student": student}[which])
    expected = expect(dict(teacher.named_parameters()), student)
    ema.update(0.9)
    assert_followed(teacher, student, expected)


@every_backend
def test_freezing_is_followed(backend):
    teacher, student, ema = pair(backend=backend, copy_dtype=torch.bfloat16)
    for frozen in (False, True):
        student.frozen.requires_grad_(not frozen)
        student.head.requires_grad_(frozen)
        expected = expect(ema.state_dict(), student)
        ema.update(0.9)
        assert_followed(teacher, student, expected)
        step(student)


def drop_head(m):
    del m.head


CHANGES = {
    "added": (lambda m: setattr(m, "more", nn.Linear(2, 2)), r"unexpected 'more.weight' and 1 more"),
    "removed": (drop_head, r"lacks 'head.weight'"),
    "reshaped": (lambda m: setattr(m.head.weight, "data", torch.zeros(7, 8, device=DEVICE)), r"\(7, 8\).*\(7, 7\)"),
    "dtype": (lambda m: m.head.to(torch.float16), r"'head.weight' as .*torch.float16, expected .*torch.float32"),
    "buffer": (lambda m: m.register_buffer("count", torch.zeros(1)), r"unexpected 'count'"),
}


@pytest.mark.parametrize("which", ["teacher", "student"])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_refused(which, change):
    teacher, student, ema = pair()
    ema.update(0.9)
    function, message = CHANGES[change]
    function({"teacher": teacher, "student": student}[which])
    for _ in range(2):  # and not forgotten
        with pytest.raises(ValueError, match=rf"EMA: the {which} .*{message}.*make a new EMA"):
            ema.update(0.9)


def test_a_refused_plan_is_not_used():
    teacher, student, ema = pair()
    teacher.scale.requires_grad_()
    with pytest.raises(ValueError, match=r"scale of the teacher requires gradients.*requires_grad_\(False\)"):
        ema.update(0.9)
    teacher.scale.requires_grad_(False)
    expected = expect(dict(teacher.named_parameters()), student)
    ema.update(0.9)
    assert_followed(teacher, student, expected)


def test_what_makes_no_pair_is_refused():
    student = Net()
    teacher = copy.deepcopy(student).requires_grad_(False)
    with pytest.raises(ValueError, match=r"scale of the teacher requires gradients"):
        EMA(copy.deepcopy(student), student)
    with pytest.raises(ValueError, match=r"scale of the teacher requires gradients"):
        EMA(student, student)
    shared = copy.deepcopy(teacher)
    shared.scale.data = student.scale.data
    for copy_dtype in (None, torch.bfloat16):
        with pytest.raises(ValueError, match=r"scale is one tensor in teacher and student.*deepcopy"):
            EMA(shared, student, copy_dtype=copy_dtype)
    assert all(p.dtype == torch.float32 for p in shared.parameters())  # refused before anything is rounded
    with pytest.raises(
        ValueError, match=r"student has the unexpected 'weight' and 1 more, lacks 'frozen'.*what the teacher"
    ):
        EMA(teacher, nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"copy_dtype=torch.float32 must be a low-precision dtype"):
        EMA(teacher, student, copy_dtype=torch.float32)
    with pytest.raises(ValueError, match=r"give one of the two"):
        EMA(teacher, student, copy_dtype=torch.float16, masters=teacher)
    with pytest.raises(ValueError, match=r"of masters is torch.bfloat16; an average in low precision does not move"):
        EMA(teacher, student, masters=copy.deepcopy(teacher).bfloat16())
    with pytest.raises(ValueError, match=r"in the teacher and on meta in the student; move"):
        EMA(teacher, copy.deepcopy(student).to("meta"))
    with pytest.raises(ValueError, match=r"unknown backend 'fast'"):
        EMA(teacher, student, backend="fast")
    ema = EMA(teacher, student)
    with pytest.raises(ValueError, match=r"decay=1.5 must be between 0"):
        ema.update(1.5)
    with pytest.raises(TypeError, match=r"0-dim float64"):
        ema.update(torch.tensor(0.9))


def test_backend_that_cannot_run(monkeypatch):
    student = Net()
    teacher = copy.deepcopy(student).requires_grad_(False)
    monkeypatch.setattr(backends, "HAS_TRITON", False)
    with pytest.raises(BackendError, match="Triton is not installed"):
        EMA(teacher, student, backend="triton")
    EMA(teacher, student)


def test_modules_without_parameters():
    ema = EMA(nn.Identity(), nn.Identity())
    ema.update(0.9)
    assert ema.state_dict() == {}


@every_backend
def test_double_precision(backend):
    student = Net().to(DEVICE, torch.float64)
    teacher = copy.deepcopy(student).requires_grad_(False)
    ema = EMA(teacher, student, backend=backend, copy_dtype=torch.bfloat16)
    step(student)
    expected = expect(ema.state_dict(), student)
    ema.update(0.9)
    assert_followed(teacher, student, expected)
    assert all(t.dtype == torch.float64 for t in ema.state_dict().values())


@pytest.mark.parametrize("copy_dtype", [None, torch.bfloat16])
def test_state_dict(copy_dtype):
    teacher, student, ema = pair(copy_dtype=copy_dtype)
    ema.update(0.9)
    state = {name: tensor.clone() for name, tensor in ema.state_dict().items()}
    assert list(state) == [name for name, _ in student.named_parameters()]
    other_teacher, other_student, other = pair(copy_dtype=copy_dtype)
    other_student.load_state_dict(student.state_dict())
    other.load_state_dict(state)
    same(other.state_dict().values(), state.values())
    same(other_teacher.parameters(), teacher.parameters())
    step(student)
    other_student.load_state_dict(student.state_dict())
    ema.update(0.9)
    other.update(0.9)
    same(other.state_dict().values(), ema.state_dict().values())
    del state["scale"]
    state["head.weight"] = state["head.weight"][1:]
    with pytest.raises(ValueError, match=r"the state lacks 'scale', has 'head.weight' as \(6, 7\), expected \(7, 7\)"):
        ema.load_state_dict(state)


# --- CUDA -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_moving_to_a_gpu_is_followed():
    student = Net()
    teacher = copy.deepcopy(student).requires_grad_(False)
    ema = EMA(teacher, student, copy_dtype=torch.bfloat16)
    teacher.to(DEVICE)
    student.to(DEVICE)
    step(student)
    ema.update(0.9)
    assert all(t.device == student.scale.device for t in ema.state_dict().values())


@pytest.mark.gpu
@needs_triton
def test_cuda_graph_takes_new_decays():
    """Captured once; the decay and the student change in place. The table outlives a plan that replaced it."""
    teacher, student, ema = pair(copy_dtype=torch.bfloat16, backend="triton")
    decay = torch.tensor(1.0, dtype=torch.float64, device=DEVICE)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        ema.update(decay)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ema.update(decay)
    ema._follow()
    for value in (0.9, 0.3):
        step(student)
        expected = expect(ema.state_dict(), student, value)
        decay.fill_(value)
        graph.replay()
        assert_followed(teacher, student, expected)


@pytest.mark.gpu
@needs_triton
def test_no_table_is_made_during_capture():
    teacher, student = normal((40,)), normal((40,), seed=1)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="run one update on the same tensors before the capture"):  # noqa: SIM117
        with torch.cuda.graph(graph):
            ema_update_(teacher, student, 0.9, backend="triton")
