"""Sinkhorn-Knopp: the teacher's logits to targets that use all prototypes alike."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch import distributed as dist

# exp() of a wider range leaves fp32, and clamping what it loses is silently wrong
_WIDEST_RANGE = 80.0


@torch.no_grad()
def sinkhorn_knopp(
    logits: Float[Tensor, "batch prototype"], temp: float, n_iterations: int = 3
) -> Float[Tensor, "batch prototype"]:
    """Normalise logits alternately over samples and prototypes (SwAV; DINOv2; DINOv3, sec. 3).

    Samples of all ranks count together; without a process group there is one rank. Each iteration
    divides every prototype by its sum over samples, then every sample by its sum over prototypes.
    The original exponentiates the logits as they are and ends in NaN from ``88 * temp`` on; here a
    constant is subtracted, which changes nothing, and a range too wide for fp32 is computed with
    logarithms.

    Args:
        logits: One row per sample of this rank.
        temp: Teacher temperature, positive.
        n_iterations: 3 in DINOv2 and DINOv3.

    Returns:
        Assignments in fp32; rows sum to 1.

    Raises:
        ValueError: If the shape or the temperature is not one that can be used.
    """
    if logits.ndim != 2:
        raise ValueError(f"logits must be (B, K), got {tuple(logits.shape)}")
    if not temp > 0:
        raise ValueError(f"temp must be positive, got {temp}")
    z = logits.float() / temp
    # a rank without samples takes part in the sums of the others
    ends = torch.stack([z.max(), -z.min()]) if len(z) else z.new_full((2,), -torch.inf)
    highest, lowest = _all_reduce(ends, "MAX").unbind()
    z = z - highest
    if highest + lowest < _WIDEST_RANGE:
        return _with_scaling_vectors(z.exp(), n_iterations)
    return _with_logarithms(z, n_iterations)


def _with_scaling_vectors(
    a: Float[Tensor, "batch prototype"], n_iterations: int
) -> Float[Tensor, "batch prototype"]:
    """Return P = diag(v) A diag(u), with one sum of K numbers over the ranks per iteration."""
    v = a.new_ones(len(a))
    u = a.new_ones(a.shape[1])
    for _ in range(n_iterations):
        u = 1 / _all_reduce(v @ a, "SUM")
        v = 1 / (a @ u)
    return v[:, None] * a * u


def _with_logarithms(
    z: Float[Tensor, "batch prototype"], n_iterations: int
) -> Float[Tensor, "batch prototype"]:
    for _ in range(n_iterations):
        peak = z.amax(0) if len(z) else z.new_full((z.shape[1],), -torch.inf)
        peak = _all_reduce(peak, "MAX")
        z = z - peak - _all_reduce((z - peak).exp().sum(0), "SUM").log()
        z = z - z.logsumexp(1, keepdim=True)
    return z.exp()


def _all_reduce(values: Tensor, operation: str) -> Tensor:
    """Combine a tensor of every rank, if there are several."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        values = values.contiguous()
        dist.all_reduce(values, op=getattr(dist.ReduceOp, operation))
    return values
