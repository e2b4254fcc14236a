import pytest
import torch

from cat.data.masks import MaskConfig, inverse_block_masks

GRID = (64, 8)


def draw(config=None, grid=GRID, seed=0, step=0, clips=4):
    clips = torch.arange(clips) if isinstance(clips, int) else torch.tensor(clips)
    return inverse_block_masks(config or MaskConfig(), grid, seed=seed, step=step, clips=clips)


@pytest.mark.parametrize("grid", [(64, 8), (32, 4), (128, 16), (8, 8), (1, 8), (5, 3), (1, 1)])
@pytest.mark.parametrize("ratio", [0.8, 0.5, 0.0])
def test_exact_count_ascending_and_in_range(grid, ratio):
    config = MaskConfig(ratio=ratio, num_masks=3)
    L = grid[0] * grid[1]
    visible = draw(config, grid)
    assert visible.shape == (12, max(1, int(L * (1 - ratio))))
    assert visible.dtype == torch.int64
    assert visible.min() >= 0
    assert visible.max() < L
    assert (visible[:, 1:] > visible[:, :-1]).all()


def test_paper_counts():
    assert draw().shape == (16, 102)


def stamped_share(samples=3000, seed=1):
    """The released procedure, cell by cell: share of visible cells per frequency column and per time row."""
    g = torch.Generator().manual_seed(seed)
    H, W, keep = *GRID, 0.2
    total = torch.zeros(H, W)
    for _ in range(samples):
        visible = torch.zeros(H, W, dtype=torch.bool)
        for centre in torch.randint(H * W, (int(H * W * (keep + 0.07) / 25),), generator=g).tolist():
            rows = (torch.arange(-2, 3) + centre // W).clamp(0, H - 1)
            columns = (torch.arange(-2, 3) + centre % W).clamp(0, W - 1)
            visible[rows[:, None], columns[None, :]] = True
        flat, K = visible.flatten(), int(H * W * keep)
        excess = int(flat.sum()) - K
        pool = flat.nonzero()[:, 0] if excess > 0 else (~flat).nonzero()[:, 0]
        flat[pool[torch.randperm(len(pool), generator=g)[: abs(excess)]]] = excess <= 0
        total += flat.reshape(H, W)
    return total / samples


def test_distribution_is_the_released_one():
    visible = draw(clips=2500)  # 10,000 masks
    ours = torch.zeros(10_000, 512).scatter(1, visible, 1).mean(0).reshape(GRID)
    expected = stamped_share()
    # columns average 64 cells over 3,000 and 10,000 masks; neighbouring cells are correlated (blocks of 5)
    assert (ours.mean(0) - expected.mean(0)).abs().max() < 0.01
    assert (ours.mean(1) - expected.mean(1)).abs().max() < 0.02
    # clamping at the border: the outermost frequency columns are seen clearly less often
    assert ours.mean(0)[0] < 0.17
    assert ours.mean(0)[3] > 0.21
    assert ours.mean() == pytest.approx(102 / 512, abs=1e-6)


def test_blocks_not_single_cells():
    visible = draw(clips=100)
    seen = torch.zeros(400, 512).scatter(1, visible, 1).reshape(400, 64, 8)
    both = (seen[:, 1:] * seen[:, :-1]).sum() / seen[:, 1:].sum()  # P(the cell before is visible | visible)
    assert both > 0.55  # 0.2 for independent cells


def test_a_mask_depends_on_seed_step_clip_and_number_only():
    whole = draw(seed=3, step=7, clips=10)
    assert torch.equal(draw(seed=3, step=7, clips=[5]), whole[20:24])
    assert torch.equal(draw(seed=3, step=torch.tensor(7), clips=10), whole)
    for other in (
        draw(seed=4, step=7, clips=10),
        draw(seed=3, step=8, clips=10),
        draw(seed=3, step=7, clips=[*range(10, 20)]),
    ):
        assert not (other == whole).all(1).any()
    assert whole.unique(dim=0).shape[0] == 40


@pytest.mark.gpu
def test_same_masks_on_the_gpu():
    clips = torch.arange(50)
    config = MaskConfig()
    on_gpu = inverse_block_masks(config, GRID, seed=1, step=2, clips=clips.cuda())
    assert torch.equal(on_gpu.cpu(), inverse_block_masks(config, GRID, seed=1, step=2, clips=clips))


@pytest.mark.parametrize("bad", [{"ratio": 1.0}, {"ratio": -0.1}, {"num_masks": 0}, {"block": 4}])
def test_bad_config_names_the_value(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        MaskConfig(**bad)


def test_no_clips():
    assert draw(clips=0).shape == (0, 102)
