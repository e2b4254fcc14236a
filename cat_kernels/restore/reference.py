"""`restore_tokens` as its formula reads, in differentiable PyTorch; any floating-point type.

Shapes: N clip-clones, K visible patches, L = length patches, D width.
"""

from torch import Tensor

from cat_kernels import philox


def restore_tokens_reference(
    tokens: Tensor, visible: Tensor, length: int, rng: Tensor, *, sigma: float = 0.01
) -> Tensor:
    """See `cat_kernels.restore_tokens`."""
    N, _, D = tokens.shape
    noise_NLD = (sigma * philox.normal(rng, N * length * D)).view(N, length, D).to(tokens.dtype)
    return noise_NLD.scatter(1, visible[:, :, None].expand(-1, -1, D), tokens)
