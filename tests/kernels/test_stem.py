"""What is special about MultiResConv; parity, gradients, layouts and bad inputs are test_operators.py's part."""

from functools import partial

import pytest
import torch

from cat_kernels import MultiResConv
from cat_kernels.stem import taps as taps_sums
from cat_kernels.stem import visible as visible_formulation
from cat_kernels.stem import whole
from cat_kernels.stem.layout import block_order, block_places, halo_rows, patchify, strides
from cat_kernels.stem.spec import RESOLUTION_SETS, draw_visible

SMALL = {"resolutions": (4, 8, 16), "channels": (6, 10), "embed_dim": 14}


def small_stem(**settings):
    torch.manual_seed(0)
    return MultiResConv(**{**SMALL, **settings}).double()


def inputs(B=2, M=2, grid=(5, 3), K=6, P=16, in_chans=1):
    g = torch.Generator().manual_seed(1)
    spec = torch.randn(B, in_chans, grid[0] * P, grid[1] * P, generator=g, dtype=torch.float64)
    return spec, draw_visible(B * M, grid[0] * grid[1], K, g, spec.device)


def gradients(stem, spec, visible):
    spec = spec.clone().requires_grad_()
    tokens = stem(spec, visible)
    weight = torch.linspace(-1, 1, tokens[0, 0].numel(), dtype=tokens.dtype)
    grads = torch.autograd.grad((tokens * weight).sum(), [spec, *stem.parameters()])
    return tokens.detach(), grads


@pytest.mark.parametrize("settings", [
    {"in_chans": 2},
    {"kernel_size": 3},
    {"kernel_size": 7},
    {"kernel_size": 11},
    {"kernel_size": 1},
    {"depth": 1},
    {"depth": 0},
    {"mlp_ratio": 1.5},
    {"resolutions": (3, 6, 18)},
    {"resolutions": (1, 2, 4)},
])  # fmt: skip
def test_backends_agree_for_every_setting(settings):
    spec, visible = inputs(in_chans=settings.get("in_chans", 1), P=settings.get("resolutions", (16,))[-1])
    stem = small_stem(**settings)
    for v in (visible, None):
        stem.backend = "dense"
        expected, expected_grads = gradients(stem, spec, v)
        stem.backend = "visible"
        actual, actual_grads = gradients(stem, spec, v)
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(actual_grads, expected_grads, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("backend", ["visible", "dense"])
def test_masked_pixels_change_nothing(backend):
    stem = small_stem(backend=backend)
    spec, visible = inputs(M=1)
    seen = torch.zeros(2, 15, dtype=torch.bool).scatter(1, visible, True).reshape(2, 1, 5, 3)
    seen = seen.repeat_interleave(16, 2).repeat_interleave(16, 3)
    changed = torch.where(seen, spec, 1e6 * torch.ones_like(spec))
    tokens, grads = gradients(stem, spec, visible)
    other_tokens, other_grads = gradients(stem, changed, visible)
    torch.testing.assert_close(other_tokens, tokens, rtol=0, atol=1e-12)
    torch.testing.assert_close(other_grads, grads, rtol=1e-10, atol=1e-10)
    assert (grads[0][~seen] == 0).all()
    assert (grads[0][seen] != 0).any()


def test_permuting_the_list_permutes_the_tokens():
    stem = small_stem()
    spec, visible = inputs()
    order = torch.randperm(6, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(stem(spec, visible[:, order]), stem(spec, visible)[:, order], rtol=0, atol=1e-12)


def test_clones_are_independent():
    stem = small_stem()
    spec, visible = inputs(B=2, M=3)
    together = stem(spec, visible)
    for row in range(6):
        alone = stem(spec[row // 3 : row // 3 + 1], visible[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-12)


def test_all_visible_in_order_is_dense():
    stem = small_stem()
    spec, _ = inputs()
    torch.testing.assert_close(stem(spec, torch.arange(15).expand(2, 15)), stem(spec), rtol=0, atol=1e-12)


def test_whole_spectrograms_need_no_table_of_neighbours(monkeypatch):
    stem = small_stem()
    spec, visible = inputs()
    tokens = stem(spec)
    monkeypatch.setattr(visible_formulation, "halo_rows", lambda *_: pytest.fail("neighbours were looked up"))
    assert torch.equal(stem(spec), tokens)
    with pytest.raises(pytest.fail.Exception):
        stem(spec, visible)


@pytest.mark.parametrize("masked", [False, True])
def test_rows_in_pieces_are_the_same(masked, monkeypatch):
    stem = small_stem()
    spec, visible = inputs()
    found = []
    for piece in (1 << 30, 7):  # all at once; many, the last of them shorter
        monkeypatch.setattr(visible_formulation, "PIECE", piece)
        tokens, grads = gradients(stem, spec, visible if masked else None)
        found.append([tokens, *grads])
    torch.testing.assert_close(found[1], found[0], rtol=1e-11, atol=1e-11)


def convolution(layout, dtype, k=5):
    """x, taps, bias; PyTorch's depthwise convolution of them, of patches or whole grids; the one with our gradients."""
    g = torch.Generator().manual_seed(1)
    c = 6
    if layout == "patches":
        halo = halo_rows(draw_visible(4, 15, 6, g, torch.device("cpu")), (5, 3), (2, 2), k // 2)
        table = {"halo": halo, "order": block_order((2, 2), halo.device)}
        plain = partial(visible_formulation.masked_depthwise, **table)
        pieces = partial(visible_formulation._pieces, **table)
        x = torch.randn(halo.shape[0] * 16, c, generator=g)
    else:
        plain, pieces = whole._convolve, whole._pieces
        x = torch.randn(3, 20, 12, c, generator=g)
    weights = torch.randn(c, 1, k, k, generator=g), torch.randn(c, generator=g)
    inputs = [t.to(dtype).requires_grad_() for t in (x, *weights)]
    return inputs, plain, lambda x, taps, bias: taps_sums.convolved(x, taps, bias, plain, pieces)


@pytest.mark.parametrize("layout", ["patches", "grids"])
@pytest.mark.parametrize("piece", [1, 700, 1 << 18])  # one line or patch; several, the last piece shorter; all
def test_gradients_of_taps_are_summed_in_float32(layout, piece, monkeypatch):
    monkeypatch.setattr(taps_sums, "PIECE_ELEMENTS", piece)
    (x, taps, bias), plain, ours = convolution(layout, torch.bfloat16)
    taps, bias = (t.detach().float().requires_grad_() for t in (taps, bias))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ours(x, taps, bias)
        assert torch.equal(y, plain(x, taps, bias))
    incoming = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    dx, *found = torch.autograd.grad(y, [x, taps, bias], incoming)
    exact = [t.detach().double().requires_grad_() for t in (x, taps, bias)]
    expected_dx, *expected = torch.autograd.grad(plain(*exact), exact, incoming.double())
    assert dx.dtype == torch.bfloat16
    torch.testing.assert_close(dx.double(), expected_dx, rtol=1e-2, atol=1e-2)
    for a, b in zip(found, expected, strict=True):  # PyTorch's in bf16 are 2e-3 off
        assert a.dtype == torch.float32
        assert (a - b).norm() < 1e-6 * b.norm()


@pytest.mark.parametrize("layout", ["patches", "grids"])
def test_second_derivatives_and_transforms_of_the_depthwise_convolution(layout):
    inputs, plain, ours = convolution(layout, torch.float64, k=3)

    def derivatives(f):
        grads = torch.autograd.grad(f(*inputs).pow(3).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.sin().sum() for g in grads), inputs)
        constants = [t.detach() for t in inputs]
        transformed = torch.func.grad(lambda *t: f(*t).pow(3).sum(), argnums=(0, 1, 2))(*constants)
        return [*grads, *second, *transformed, torch.func.jvp(f, tuple(constants), tuple(constants))[1]]

    torch.testing.assert_close(derivatives(ours), derivatives(plain), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", ["patches", "grids"])
def test_the_depthwise_convolution_keeps_rows_and_no_windows(layout):
    inputs, _, ours = convolution(layout, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape), lambda _: None):
        ours(*inputs)
    assert kept == [inputs[0].shape, inputs[1].shape]


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_only_the_gradients_that_are_wanted_are_made(wanted):
    inputs, plain, ours = convolution("patches", torch.float64)
    found, expected = [], []
    for f, grads in ((ours, found), (plain, expected)):
        tensors = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
        f(*tensors).sum().backward()
        grads += [t.grad for t in tensors]
    assert [g is None for g in found] == [i not in wanted for i in range(3)]
    torch.testing.assert_close([g for g in found if g is not None], [g for g in expected if g is not None])


def test_state_dicts_are_the_same_for_every_backend():
    dense, visible = MultiResConv(**SMALL, backend="dense"), MultiResConv(**SMALL, backend="visible")
    visible.load_state_dict(dense.state_dict())


def test_base_model_has_the_papers_size():
    with torch.device("meta"):
        stem = MultiResConv()
    assert sum(p.numel() for p in stem.parameters()) == 10_805_888  # 10.81 M


def test_initial_weights():
    torch.manual_seed(0)
    stem = MultiResConv().requires_grad_(False)
    assert stem.proj.weight.std() == pytest.approx(0.02, rel=0.02)
    assert (stem.proj.bias == 0).all()
    embed = stem.embeds[1].proj.weight  # xavier-uniform over [out, rest]
    assert embed.abs().max() == pytest.approx((6 / (384 + 256 * 4)) ** 0.5, rel=1e-3)
    block = stem.stages[0][0]  # PyTorch's default of a convolution
    assert block.conv1.weight.abs().max() == pytest.approx(256**-0.5, rel=1e-2)
    assert block.dwconv.weight.abs().max() == pytest.approx(25**-0.5, rel=1e-2)
    assert (block.norm1.weight == 1).all()
    assert (block.norm1.bias == 0).all()


def test_block_order_is_z_order_for_factors_of_two():
    order = block_order((2, 2), torch.device("cpu"))
    assert order.tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert block_order((4,), torch.device("cpu")).tolist() == list(range(16))


@pytest.mark.parametrize("factors", [(), (3,), (2, 3), (2, 4, 2)])
def test_block_places_undo_block_order(factors):
    order, places = (f(factors, torch.device("cpu")) for f in (block_order, block_places))
    assert places[order].tolist() == list(range(order.numel()))


@pytest.mark.parametrize("resolutions", [s[0] for s in RESOLUTION_SETS])
def test_patchify_puts_every_pixel_where_the_formula_reads_it(resolutions):
    P, r0 = resolutions[-1], resolutions[0]
    spec = torch.arange(2 * 3 * P * 2 * P, dtype=torch.float32).reshape(2, 1, 3 * P, 2 * P)
    pixels = patchify(spec, resolutions)
    side = P // r0
    order = block_order(strides(resolutions)[:0:-1], spec.device)
    for b, patch, s in [(0, 0, 0), (1, 5, side * side - 1), (1, 3, side * side // 2)]:
        h, w = divmod(patch, 2)
        row, column = divmod(int(order[s]), side)
        top, left = h * P + row * r0, w * P + column * r0
        assert torch.equal(pixels[b, patch, s], spec[b, 0, top : top + r0, left : left + r0].flatten())


def test_halo_of_one_patch_reads_its_neighbours_and_zeros():
    # a 2 x 2 grid of patches with 2 x 2 positions each; patches 0 and 3 visible
    rows = halo_rows(torch.tensor([[0, 3]]), (2, 2), (2,), radius=1)
    zero = 8
    assert rows[0].reshape(4, 4).tolist() == [
        [zero, zero, zero, zero],
        [zero, 0, 1, zero],
        [zero, 2, 3, zero],
        [zero, zero, zero, 4],
    ]


def test_compiles_once_for_any_length():
    stem = MultiResConv(**SMALL)
    compiles = []

    def count(graph, example_inputs):
        compiles.append(graph)
        return graph.forward

    compiled = torch.compile(stem, fullgraph=True, dynamic=True, backend=count)
    for T in (5, 7, 9):
        spec, visible = inputs(grid=(T, 3), K=T)
        torch.testing.assert_close(compiled(spec.float(), visible), stem(spec.float(), visible))
    assert len(compiles) == 1


@pytest.mark.parametrize(("settings", "message"), [
    ({"resolutions": ()}, "resolutions="),
    ({"resolutions": (4, 6, 16)}, "6 is not a larger multiple of 4"),
    ({"resolutions": (16, 8, 4)}, "8 is not a larger multiple of 16"),
    ({"channels": (6,)}, "names 1 widths"),
    ({"kernel_size": 4}, "kernel_size=4"),
    ({"backend": "cuda"}, "backend='cuda'"),
])  # fmt: skip
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        MultiResConv(**{**SMALL, **settings})
