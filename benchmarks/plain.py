"""The hypergradient written by hand in plain torch: what the library is measured against, and exact references."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.tasks import Task


class Plain:
    """One implicit hypergradient as an expert writes it for one problem: no checks, no options, no diagnosis.

    Vectors are flat, the weights are leaves of their own, the graph of the lower gradient is built once, and CG makes
    nothing but its five operations, in place.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.hvps = 0
        self._names = list(task.y)
        self._shapes = [leaf.shape for leaf in task.y.values()]
        self._sizes = [leaf.numel() for leaf in task.y.values()]

    def hypergradient(self, steps: int) -> Tensor:
        """Return dF/dx at the task's point, flat, by `steps` steps of CG from zero."""
        b = self.upper_gradient()
        self.linearize()
        return self.cross(conjugate_gradients(self.hvp, b, steps)).neg_()

    def upper_gradient(self) -> Tensor:
        """Return df/dy, flat."""
        ys = [leaf.detach().requires_grad_() for leaf in self.task.y.values()]
        value = self.task.loss(dict(zip(self._names, ys, strict=True)), self.task.upper)
        return _flat(torch.autograd.grad(value, ys))

    def linearize(self) -> None:
        """Build the graph of the lower gradient."""
        xs = {name: leaf.detach().requires_grad_() for name, leaf in self.task.x.items()}
        ys = {name: leaf.detach().requires_grad_() for name, leaf in self.task.y.items()}
        self._xs, self._ys = list(xs.values()), list(ys.values())
        value = self.task.traced(xs, ys, self.task.lower)
        self._gradient = torch.autograd.grad(value, self._ys, create_graph=True)

    def hvp(self, v: Tensor) -> Tensor:
        """Return H v."""
        self.hvps += 1
        return _flat(torch.autograd.grad(self._gradient, self._ys, self._leaves(v), retain_graph=True))

    def cross(self, v: Tensor) -> Tensor:
        """Return J^T v."""
        return _flat(torch.autograd.grad(self._gradient, self._xs, self._leaves(v), retain_graph=True))

    def floor(self, hvps: int) -> None:
        """Do all the differentiation of a hypergradient, and nothing else."""
        b = self.upper_gradient()
        self.linearize()
        for _ in range(hvps):
            self.hvp(b)
        self.cross(b)

    def release(self) -> None:
        """Forget the graph, so that one hypergradient does not hold the memory of the last."""
        del self._xs, self._ys, self._gradient

    def _leaves(self, v: Tensor) -> list[Tensor]:
        return [part.view(shape) for part, shape in zip(v.split(self._sizes), self._shapes, strict=True)]


def conjugate_gradients(hvp: Callable[[Tensor], Tensor], b: Tensor, steps: int) -> Tensor:
    """Return the iterate after `steps` steps from zero."""
    w, r, p = torch.zeros_like(b), b.clone(), b.clone()
    rho = float(r @ r)
    for _ in range(steps):
        q = hvp(p)
        a = rho / float(p @ q)
        w.add_(p, alpha=a)
        r.add_(q, alpha=-a)
        last, rho = rho, float(r @ r)
        p.mul_(rho / last).add_(r)
    return w


def exact(task: Task, tol: float = 1e-12, max_steps: int = 5000) -> Tensor:
    """Return the hypergradient at the task's point in float64, by CG until ‖b - H w‖ <= tol ‖b‖, recomputed.

    Raises:
        ArithmeticError: it did not get there.
    """
    task = task.to(torch.float64)
    plain = Plain(task)
    b = plain.upper_gradient()
    plain.linearize()
    scale = _flat([leaf.exp() for leaf in task.x.values()]) + 0.01
    w = torch.zeros_like(b)
    for _ in range(5):
        w, r = _refine(plain.hvp, b, w, scale, tol, max_steps)
        if float(r.norm()) <= tol * float(b.norm()):
            return -plain.cross(w)
    raise ArithmeticError(f"{task.name}: the reference stopped at a residual of {float(r.norm() / b.norm()):.1e}.")


def _refine(
    hvp: Callable[[Tensor], Tensor], b: Tensor, w: Tensor, scale: Tensor, tol: float, max_steps: int
) -> tuple[Tensor, Tensor]:
    r = b - hvp(w)
    z = r / scale
    p, rho, e = z.clone(), float(r @ z), torch.zeros_like(b)
    for _ in range(max_steps):
        q = hvp(p)
        a = rho / float(p @ q)
        e.add_(p, alpha=a)
        r = r - a * q
        if float(r.norm()) <= 0.5 * tol * float(b.norm()):
            break
        z = r / scale
        last, rho = rho, float(r @ z)
        p.mul_(rho / last).add_(z)
    return w + e, b - hvp(w + e)


def exact_softmax_regression(task: Task) -> Tensor:
    """Return the same for softmax regression by a Cholesky factor of its Hessian, written out from the formula."""
    task = task.to(torch.float64)
    plain = Plain(task)
    b = plain.upper_gradient()
    images, _ = task.lower
    weight, bias = task.y["weight"], task.y["bias"]
    classes, pixels = weight.shape
    inputs = torch.cat([images, torch.ones(len(images), 1, dtype=torch.float64)], 1)
    p = (images @ weight.T + bias).softmax(1)
    hessian = torch.zeros(classes, pixels + 1, classes, pixels + 1, dtype=torch.float64)
    for i in range(classes):
        for j in range(i, classes):
            curvature = p[:, i] * (float(i == j) - p[:, j]) / len(images)
            hessian[i, :, j] = hessian[j, :, i] = inputs.T @ (curvature[:, None] * inputs)
    d = classes * (pixels + 1)
    # The flat order is all weights, then all biases; the Hessian's is class by class.
    order = torch.arange(d).view(classes, pixels + 1)
    order = torch.cat([order[:, :-1].flatten(), order[:, -1]])
    hessian = hessian.view(d, d)
    decay = _flat(list(task.x.values())).exp()
    hessian.diagonal()[order] += decay
    w = torch.empty_like(b)
    w[:] = torch.cholesky_solve(b.new_zeros(d).index_copy(0, order, b)[:, None], torch.linalg.cholesky(hessian))[
        order, 0
    ]
    return -decay * _flat(list(task.y.values())) * w


def _flat(leaves: Sequence[Tensor]) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in leaves])
