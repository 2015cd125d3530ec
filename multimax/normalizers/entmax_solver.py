"""Probabilities of alpha-entmax, in terms of `excess` = alpha - 1.

Near alpha = 1 the excess has the digits that alpha has lost, and the power of the definition is
written as `log p = log(1 + excess u) / excess`, which goes over into SoftMax.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from multimax.functional import exporting, function_transforms_active

# Below it, rounding of the power's form shows in the gradient of alpha (1e-5 here, in fp32).
NEAR_ONE = 1 / 16
MAX_STEPS = 200  # a bound, not a setting: Newton needs about 10, bisection as many as it has bits
EXPORTED_STEPS = 16  # of Newton's method near alpha = 1, in a graph without a test


def solve(shifted: Tensor, excess: float | Tensor, dim: int) -> Tensor:
    """Probabilities of scores whose maximum is 0 in each row; there is no gradient.

    Args:
        shifted: scores less their row's maximum, fp32 or wider; -inf is masked.
        excess: >= 0; a tensor broadcasts to `shifted`, with size 1 along `dim`.
        dim: the dimension that sums to one.

    Returns:
        (..., of the shape of `shifted`), zeros for a row of -inf alone. In an exported program the
        number of steps is fixed, and the last digits may differ.
    """
    if exporting():
        return _solve_in_one_graph(shifted, excess, dim)
    if torch.compiler.is_compiling() or function_transforms_active():
        tensor, number = (excess, 0.0) if isinstance(excess, Tensor) else (None, excess)
        return torch.ops.multimax.entmax_solve(shifted, tensor, number, dim)
    return _solve(shifted, excess, dim)


def _solve(shifted: Tensor, excess: float | Tensor, dim: int) -> Tensor:
    if not isinstance(excess, Tensor):
        return (_near_one if excess < NEAR_ONE else _power)(shifted, excess, dim)
    near = excess < NEAR_ONE
    if not near.any():
        return _power(shifted, excess, dim)
    close = _near_one(shifted, excess.where(near, 0.0), dim)
    return close if near.all() else close.where(near, _power(shifted, excess.where(~near, 1), dim))


def _solve_in_one_graph(shifted: Tensor, excess: float | Tensor, dim: int) -> Tensor:
    if not isinstance(excess, Tensor):
        if excess < NEAR_ONE:
            return _near_one(shifted, excess, dim, EXPORTED_STEPS)
        return _power(shifted, excess, dim, _sort if excess in (0.5, 1) else _bisect_in_one_graph)
    near = excess < NEAR_ONE
    close = _near_one(shifted, excess.where(near, 0.0), dim, EXPORTED_STEPS)
    far = _power(shifted, excess.where(~near, 1), dim, _bisect_in_one_graph)
    return close.where(near, far)


# torch.compile calls it and vmap knows how to: its loops end when the numbers say so.
@torch.library.custom_op("multimax::entmax_solve", mutates_args=())
def _solve_operator(shifted: Tensor, excess: Tensor | None, number: float, dim: int) -> Tensor:
    return _solve(shifted, number if excess is None else excess, dim)


@_solve_operator.register_fake
def _(shifted, excess, number, dim):
    return torch.empty_like(shifted)


@_solve_operator.register_vmap
def _(info, in_dims, shifted, excess, number, dim):
    dimensions = shifted.dim() - (in_dims[0] is not None)
    moved = [
        tensor if tensor is None else _batch_first(tensor, batch, info.batch_size)
        for tensor, batch in zip((shifted, excess), in_dims[:2], strict=True)
    ]
    return torch.ops.multimax.entmax_solve(*moved, number, dim % dimensions + 1), 0


def _batch_first(tensor: Tensor, batch: int | None, size: int) -> Tensor:
    return tensor.expand(size, *tensor.shape) if batch is None else tensor.movedim(batch, 0)


def log_deformed_exp(u: Tensor, excess: float | Tensor) -> Tensor:
    """`log(1 + excess u) / excess`, which is u at excess 0; for 1 + excess u > 0."""
    grown = excess * u
    tiny = grown.abs() < 2**-18
    series = u * (1 - grown / 2 + grown * grown / 3)
    return series.where(tiny, torch.log1p(grown) / excess)


def _near_one(shifted: Tensor, excess: float | Tensor, dim: int, steps: int = 0) -> Tensor:
    """By Newton's method for lambda in `sum exp(log_deformed_exp(x - lambda)) = 1`.

    The sum is convex in lambda: a step from anywhere ends left of the solution or on it, from where
    the method cannot overshoot. It starts at SoftMax's lambda. `steps`, if not 0, are all made.
    """
    hidden = shifted == -torch.inf
    x = shifted.masked_fill(hidden, 0.0)

    def mass(offset: Tensor) -> tuple[Tensor, Tensor]:
        u = x - offset
        base = 1 + excess * u
        outside = hidden | (base <= 0)
        p = log_deformed_exp(u, excess).exp().masked_fill(outside, 0.0)
        return p, (p / base.masked_fill(outside, 1.0)).sum(dim, keepdim=True)

    # Below 1 / NEAR_ONE the largest entry keeps its mass.
    offset = shifted.logsumexp(dim, keepdim=True).clamp(0.0, 15.5)
    resolution = 4 * torch.finfo(x.dtype).eps
    for step_number in range(steps or MAX_STEPS):
        p, slope = mass(offset)
        step = ((p.sum(dim, keepdim=True) - 1) / slope).nan_to_num(0.0, 0.0, 0.0)
        if step_number:
            step = step.clamp_min(0)
        offset = (offset + step).clamp_min(0)
        if not steps and not (step.abs() > resolution * (1 + offset)).any():
            break
    p, _ = mass(offset)
    return p / p.sum(dim, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)


def _power(
    shifted: Tensor,
    excess: float | Tensor,
    dim: int,
    find_threshold: Callable[..., Tensor] | None = None,
) -> Tensor:
    """By the threshold of `(alpha - 1) x`, found by Newton's method, or by bisection above 2."""
    alpha = 1 + excess
    scaled = shifted * excess
    if find_threshold is None:
        above_two = bool((alpha > 2).any()) if isinstance(alpha, Tensor) else alpha > 2
        find_threshold = _bisect if above_two else _newton
    p = torch.relu(scaled - find_threshold(scaled, alpha, dim))
    if not isinstance(alpha, Tensor) and alpha in (1.5, 2):
        return p * p if alpha == 1.5 else p
    p = p ** (1 / (alpha - 1))
    # Large exponents and exponents below 1 magnify the rounding of the threshold.
    return p / p.sum(dim, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)


def _newton(scaled: Tensor, alpha: float | Tensor, dim: int) -> Tensor:
    """The threshold by Newton's method from -1, where the mass is at least the maximum's 1."""
    exponent = 1 / (alpha - 1)
    threshold = torch.full_like(scaled.narrow(dim, 0, 1), -1.0)
    resolution = 2 * torch.finfo(scaled.dtype).eps
    for _ in range(MAX_STEPS):
        mass, slope = _mass_and_slope(scaled, threshold, alpha, exponent, dim)
        step = ((mass - 1) / slope).clamp_min(0).nan_to_num(0.0, 0.0, 0.0)
        threshold = threshold + step
        if not (step > resolution * threshold.abs()).any():
            break
    return threshold


def _mass_and_slope(scaled, threshold, alpha, exponent, dim) -> tuple[Tensor, Tensor]:
    """Sum of relu(scaled - threshold)^exponent, and minus its derivative by the threshold."""
    base = torch.relu(scaled - threshold)
    if isinstance(alpha, Tensor) or alpha not in (1.5, 2):
        power = base.where(base > 0, 1.0) ** (exponent - 1) * (base > 0)
        return (power * base).sum(dim, keepdim=True), exponent * power.sum(dim, keepdim=True)
    if alpha == 2:
        support = (base > 0).to(base.dtype)
        return base.sum(dim, keepdim=True), support.sum(dim, keepdim=True)
    mass = torch.linalg.vector_norm(base, dim=dim, keepdim=True).square()
    return mass, 2 * base.sum(dim, keepdim=True)


def _bisect(scaled: Tensor, alpha: float | Tensor, dim: int) -> Tensor:
    """The threshold by bisection until neighbours are left."""
    exponent = 1 / (alpha - 1)
    low = torch.full_like(scaled.narrow(dim, 0, 1), -1.0)
    high = torch.zeros_like(low)
    for _ in range(MAX_STEPS):
        middle = (low + high) / 2
        if ((middle == low) | (middle == high)).all():
            break
        enough = (torch.relu(scaled - middle) ** exponent).sum(dim, keepdim=True) >= 1
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return low


def _bisect_in_one_graph(scaled: Tensor, alpha: float | Tensor, dim: int) -> Tensor:
    """The threshold by as many bisections, at geometric means, as its magnitude has digits."""
    exponent = 1 / (alpha - 1)
    low = torch.full_like(scaled.narrow(dim, 0, 1), 2.0**-62)  # -2^-62 in rows beyond 10^6 alone
    high = torch.ones_like(low)
    for _ in range(30 if scaled.dtype == torch.float32 else 59):
        middle = (low * high).sqrt()
        enough = (torch.relu(scaled + middle) ** exponent).sum(dim, keepdim=True) >= 1
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return -high


def _sort(scaled: Tensor, alpha: float, dim: int) -> Tensor:
    """The threshold for alpha = 1.5 and 2 in closed form, then without the rounding of its sums.

    Source: Peters et al., Sparse Sequence-to-Sequence Models, ACL 2019, Algorithm 2.
    """
    # Of the row's largest 1, 2, ... entries each; those below -1, such as -inf, get nothing.
    largest = scaled.sort(dim, descending=True).values.clamp_min(-1.0)
    count, total = torch.ones_like(largest).cumsum(dim), largest.cumsum(dim)
    if alpha == 2:
        thresholds = (total - 1) / count
    else:
        spread = (largest * largest).cumsum(dim) - total * total / count
        thresholds = total / count - torch.relu((1 - spread) / count).sqrt()
    inside = thresholds <= largest
    threshold = thresholds.where(inside, -1.0).amax(dim, keepdim=True)
    for _ in range(3):
        mass, slope = _mass_and_slope(scaled, threshold, alpha, 1 / (alpha - 1), dim)
        threshold = (threshold + (mass - 1) / slope).clamp(-1.0, 0.0).nan_to_num(-1.0)
    return threshold


def curvature(y: Tensor) -> Tensor:
    """`(1 - exp(-y) - y) / y^2`, which is -1/2 at 0, with all its digits for every y <= 0."""
    small = y.abs() < 0.5
    x, series = y.where(small, 0.0), torch.zeros_like(y)
    for k in range(15, 1, -1):  # sum over k >= 2 of -(-y)^(k - 2) / k!, by Horner's rule
        series = (1 - x * series) / k
    large = y.where(~small, 1.0)
    return torch.where(small, -series, (-torch.expm1(-large) - large) / (large * large))
