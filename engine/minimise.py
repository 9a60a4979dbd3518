"""Many small robust least-squares problems at once, side by side."""

import torch


def huber(residual):
    """0.5 r^2 up to |r| = 1, then |r| - 0.5."""
    size = residual.abs()
    return torch.where(size <= 1, 0.5 * size**2, size - 0.5)


def linearise(function, theta, n):
    """
    Derivatives (B, n, P) of residuals (B, n), and these. Every residual gets parameters of its
    own, so that one backward pass through their sum has the derivatives of each.
    """
    copies = theta[:, None].repeat(1, n, 1).requires_grad_()
    residuals = function(copies)
    (derivatives,) = torch.autograd.grad(residuals.sum(), copies)
    return derivatives, residuals.detach()


def from_starts(function, starts, weight, steps=400):
    """
    For each row of weights (F, n) of the residuals, where the starts (S, P) lead, the best first:
    (theta (F, S, P), by how much their last steps still improved them (F, S)). function: as in
    levenberg_marquardt.
    """
    weight = weight / weight.sum(1, keepdim=True)
    problems = weight.repeat_interleave(len(starts), 0)
    theta = starts.repeat(len(weight), 1)
    theta, value, decrease = levenberg_marquardt(function, theta, problems, steps)
    order = value.nan_to_num(torch.inf).view(len(weight), -1).argsort(1)
    rows = order + torch.arange(len(weight))[:, None] * len(starts)
    return theta[rows], decrease[rows]


def levenberg_marquardt(function, theta, weight, steps=400, tolerance=1e-6):
    """
    Minimise sum_i weight_i huber(residual_i) for B problems of P parameters. function: theta
    (B, 1 or n, P) -> residuals (B, n) in units of the Huber loss's knee, the i-th of theta[:, i]
    alone; theta (B, P) float64 starts; weight (B, n). Each step solves (J^T W J + damping diag)
    step = -J^T W r with Huber's weights W = weight / max(1, |r|); a step that does not improve is
    not taken, and the damping grows. For |r| > 1 these weights see more curvature than there is, so
    after a step that improved the next is stretched by half as much again.
    Returns (theta, values (B,), relative decrease over the last 20 steps (B,): 0 if converged).
    """
    value = (weight * huber(function(theta[:, None]))).sum(1)
    damping, stretch = torch.full_like(value, 1e-2), torch.ones_like(value)
    before, decrease = value.clone(), torch.full_like(value, torch.inf)
    working = torch.arange(len(theta))  # problems that have not converged
    for step in range(1, steps + 1):
        J, r = linearise(function, theta[working], weight.shape[1])
        w = weight[working] / r.abs().clamp(min=1)
        gradient = torch.einsum('bnp,bn->bp', J, w * r)
        H = torch.einsum('bnp,bn,bnq->bpq', J, w, J)
        diagonal = H.diagonal(dim1=1, dim2=2)
        least = 1e-8 * diagonal.amax(1, keepdim=True)  # else a term that vanishes runs away
        damped = H + torch.diag_embed(damping[working, None] * diagonal.maximum(least))
        change, failed = torch.linalg.solve_ex(damped, -gradient)
        new = theta[working] + stretch[working, None] * change
        new_value = (weight[working] * huber(function(new[:, None]))).sum(1)
        better = (new_value < value[working]) & (failed == 0)  # False where it is not a number
        improved = working[better]
        theta[improved], value[improved] = new[better], new_value[better]
        tried = stretch[working]
        factor = torch.where(better, 0.3, torch.where(tried > 1, 1.0, 5.0))
        damping[working] = (damping[working] * factor).clamp(1e-15, 1e15)
        stretch[working] = torch.where(better, 1.5 * tried, 1.0)
        if step % 20 == 0:
            decrease[working] = (before - value)[working] / value[working].clamp(min=1e-8)
            before = value.clone()
            working = working[decrease[working] > tolerance]
            if not len(working):
                break
    return theta, value, decrease
