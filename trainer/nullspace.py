"""The training-free baseline: the same change of outputs, closed form, in the directions that what is kept leaves free.

    V S Vᵀ = Pᵀ P          the directions of the preserved inputs, strongest first
    Q = I − V_k V_kᵀ       the projector onto the rest of the space
    ΔW = ((F Q)⁺ R)ᵀ       least squares for F ΔWᵀ = R inside of it, R = target − old(F)

After the null-space constraint of Fang et al., "AlphaEdit" (arXiv:2410.02355), without their regularised update.
Legend: F (N, D) forgotten inputs, P (M, D) preserved ones, E output width.
"""

import torch
from torch import Tensor


def null_space_update(forget: Tensor, preserve: Tensor, residual: Tensor, *, rank: int, energy: float = 0.999) -> Tensor:
    """ΔW (E, D) of at most `rank`, from inputs F (N, D), P (M, D) and the wanted change of F's outputs (N, E).

    `energy`: the share of P's squared singular values that counts as taken. Computed in float64, returned in float32.
    """
    rounding = max(preserve.shape) * torch.finfo(preserve.dtype).eps  # of P as it was given
    forget, preserve, residual = forget.double(), preserve.double(), residual.double()
    _, values, directions = torch.linalg.svd(preserve, full_matrices=False)
    shares = values.square().cumsum(0) / values.square().sum()
    rank_of_preserve = int((values > rounding * values[:1]).sum())  # directions beyond it are P's rounding, whatever `energy` is
    taken = directions[: min(int((shares < energy).sum()) + 1, rank_of_preserve)]  # (k, D)
    free = forget - (forget @ taken.t()) @ taken  # F Q
    left, values, right = torch.linalg.svd(free, full_matrices=False)
    # What is numerically nothing must not be divided by.
    used = min(rank, int((values > 1e-6 * torch.linalg.matrix_norm(forget, 2)).sum()))
    inverse = (right[:used].t() / values[:used]) @ left[:, :used].t()  # (D, N)
    return (inverse @ residual).t().float()
