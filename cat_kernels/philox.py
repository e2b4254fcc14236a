"""Philox4x32-10, a counter-based random number generator, in plain PyTorch.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). A draw is a pure function of a key and a
128-bit counter, so that any element of a noise tensor can be drawn alone, on any device, in any order.

The key and counter layout, the map to uniforms and the Box-Muller transform are those of Triton's `tl.randn4x`:
a Triton kernel that calls it with the same seed and offset draws the same words, and the same normals up to the last
bits of `log`, `sqrt`, `sin` and `cos`.

Words are unsigned 32-bit numbers held in int64 tensors, because PyTorch has few operations on uint32.
"""

import torch
from torch import Tensor

Four = tuple[Tensor, Tensor, Tensor, Tensor]

WORD = 0xFFFFFFFF
ROUNDS = 10
MULTIPLIER_A, MULTIPLIER_B = 0xD2511F53, 0xCD9E8D57
KEY_STEP_A, KEY_STEP_B = 0x9E3779B9, 0xBB67AE85  # golden ratio and sqrt(3) - 1, as 32-bit fractions

# The largest float32 s with 2^31 * s < 1 after rounding: uniforms never reach 1.
UNIFORM_SCALE = 4.6566127342e-10
SMALLEST_UNIFORM = 1.0e-7  # keeps log() finite; bounds a normal by 5.68
TWO_PI = 6.283185307179586

# Counters a pass of `normal` works on. On the CPU: the ten or so int64 temporaries stay in the L2 cache, and a pass is
# below the 32,768 elements from which PyTorch spreads most operations over threads; a hundred operations this short
# would mostly wait for each other. On an accelerator: temporaries of some 1.5 GB.
CHUNK_CPU = 32_000
CHUNK_ACCELERATOR = 1 << 24


def philox_words(
    seed: int | Tensor,
    c0: int | Tensor,
    c1: int | Tensor = 0,
    c2: int | Tensor = 0,
    c3: int | Tensor = 0,
) -> Four:
    """Four random 32-bit words for every counter (c0, c1, c2, c3).

    seed: 64-bit key, an int or a 0-dim int64 tensor (low word = k0, high word = k1).
    c0..c3: the counter's words, low first; ints or int64 tensors that broadcast together. Only the low 32 bits of
        each count; use `split_words` for a 64-bit counter.
    Returns four int64 tensors in [0, 2^32), of the broadcast shape, on the counters' device.
    """
    counters = (c0, c1, c2, c3)
    device = next((c.device for c in counters if isinstance(c, Tensor)), None)
    tensors = [_as_word(c, device) for c in counters]
    key = seed.to(device, torch.int64) if isinstance(seed, Tensor) else _number(_wrap(seed), device)
    c0_, c1_, c2_, c3_ = torch.broadcast_tensors(*tensors)
    return _rounds(c0_, c1_, c2_, c3_, key & WORD, (key >> 32) & WORD)


def split_words(counter: Tensor) -> tuple[Tensor, Tensor]:
    """Low and high 32-bit words of an int64 tensor."""
    return counter & WORD, (counter >> 32) & WORD


def uniform(words: Tensor) -> Tensor:
    """float32 in [0, 1) from 32-bit words, as Triton's `uint_to_uniform_float`: the sign bit is folded, not used."""
    # As a signed number, x < 0 becomes -x - 1; of the unsigned word that is the smaller of x and its complement.
    return torch.minimum(words, WORD - words).to(torch.float32).mul_(UNIFORM_SCALE)


def box_muller(u1: Tensor, u2: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent standard normals from two float32 uniforms, as Triton's `pair_uniform_to_normal`."""
    radius = torch.log(u1.clamp_min(SMALLEST_UNIFORM)).mul_(-2.0).sqrt_()
    angle = TWO_PI * u2
    return torch.cos(angle).mul_(radius), torch.sin(angle).mul_(radius)


def normal(rng: Tensor, count: int) -> Tensor:
    """Standard normals for flat elements 0..count-1 of a stream.

    rng: int64 (2,) = (seed, offset). Element e is lane e % 4 of `tl.randn4x(seed, offset + e // 4)`; it does not
        depend on `count`. The counter is 64 bits wide, so streams whose offsets are count/4 apart do not overlap.
    Returns float32 (count,) on the device of `rng`. Never synchronises with the host.
    """
    out = torch.empty(count, dtype=torch.float32, device=rng.device)
    return fill_normal_(out, rng)


def rng(seed: int, offset: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """int64 (2,) = (seed, offset) for `normal`, written on the device."""
    return torch.stack([_number(_wrap(seed), device), _number(_wrap(offset), device)])


def fill_normal_(out: Tensor, rng: Tensor, std: float = 1.0) -> Tensor:
    """Fill the contiguous 1-D tensor `out` with std * `normal(rng, out.numel())`, rounded to its dtype; return it."""
    seed, offset = rng[0], rng[1]
    whole, rest = divmod(out.numel(), 4)
    lanes_C4 = out[: 4 * whole].view(whole, 4)
    step = CHUNK_CPU if rng.device.type == "cpu" else CHUNK_ACCELERATOR
    for start in range(0, whole, step):
        stop = min(start + step, whole)
        counter = torch.arange(start, stop, dtype=torch.int64, device=rng.device) + offset
        for lane, noise in enumerate(randn4x(seed, counter)):
            torch.mul(noise, std, out=lanes_C4[start:stop, lane])
    if rest:
        last = torch.stack(randn4x(seed, offset + whole))
        torch.mul(last[:rest], std, out=out[4 * whole :])
    return out


def randn4x(seed: int | Tensor, counter: Tensor) -> Four:
    """`tl.randn4x(seed, counter)`: four tensors of float32 standard normals for 64-bit counters (int64)."""
    low, high = split_words(counter)
    w0, w1, w2, w3 = philox_words(seed, low, high)
    return *box_muller(uniform(w0), uniform(w1)), *box_muller(uniform(w2), uniform(w3))


def _rounds(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor) -> Four:
    for _ in range(ROUNDS):
        # The int64 product of two 32-bit words may wrap; all of its 64 bits are right all the same. In place, because
        # memory traffic is what this costs.
        product_a, product_b = c0 * MULTIPLIER_A, c2 * MULTIPLIER_B
        c0 = (product_b >> 32).bitwise_and_(WORD).bitwise_xor_(c1).bitwise_xor_(k0)
        c2 = (product_a >> 32).bitwise_and_(WORD).bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = product_b.bitwise_and_(WORD), product_a.bitwise_and_(WORD)
        k0, k1 = (k0 + KEY_STEP_A) & WORD, (k1 + KEY_STEP_B) & WORD
    return c0, c1, c2, c3


def _as_word(value: int | Tensor, device: torch.device | None) -> Tensor:
    if isinstance(value, Tensor):
        if value.dtype != torch.int64:
            raise TypeError(f"a Philox counter must be an int64 tensor, got {value.dtype}; convert it with .long()")
        return value & WORD
    return _number(value & WORD, device)


def _number(value: int, device: torch.device | str | None) -> Tensor:
    """0-dim, written on the device: `torch.tensor` would copy it there, and wait."""
    return torch.full((), value, dtype=torch.int64, device=device)


def _wrap(seed: int) -> int:
    """A 64-bit pattern as the int64 that holds it; seeds in [-2^63, 2^64) are told apart modulo 2^64."""
    seed &= (1 << 64) - 1
    return seed - (1 << 64) if seed >= 1 << 63 else seed
