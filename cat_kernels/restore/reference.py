"""`restore_tokens` as its formula reads, in differentiable PyTorch; any floating-point type.

Shapes: N clip-clones, K visible patches, L = num_patches, D width.
"""

from torch import Tensor

from .. import philox


def restore_tokens_reference(
    tokens: Tensor, visible: Tensor, num_patches: int, seed: Tensor | int, *, noise_std: float = 0.01
) -> Tensor:
    """See `cat_kernels.restore_tokens`."""
    N, _, D = tokens.shape
    rng = philox.rng(seed, device=tokens.device) if isinstance(seed, int) else seed
    noise_NLD = (noise_std * philox.normal(rng, N * num_patches * D)).view(N, num_patches, D).to(tokens.dtype)
    return noise_NLD.scatter(1, visible[:, :, None].expand(-1, -1, D), tokens)
