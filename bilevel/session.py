"""The door for torch.optim habits: hold the state, step by step."""

from __future__ import annotations

from typing import Any

from bilevel.dry_run import open_oracles
from bilevel.layout import Variables
from bilevel.oracles import Counts
from bilevel.packing import pack, unpack
from bilevel.plan import Auto, plan
from bilevel.problem import Problem
from bilevel.solvers._base import Metrics, Solver
from bilevel.status import InvalidProblem


class Session:
    """Hold a problem, a solver and its state, and step like an optimizer of torch.optim.

    Args:
        problem: the statement.
        solver: how to solve it; "auto" takes what `plan` recommends, which is then `session.solver`.
        x0: upper start; never changed.
        y0: lower start; `problem.lower_init(x0)` if None.
        seed: of batches and of randomness inside the objectives.

    Raises:
        InvalidProblem: and relatives, from the dry run at the door.

    Example:
        >>> import bilevel, torch
        >>> task = bilevel.problems.scalar()
        >>> session = Session(task.problem, bilevel.implicit(), task.x0, task.y0)
        >>> first = float(session.step().upper_value)
        >>> for _ in range(50):
        ...     metrics = session.step()
        >>> float(metrics.upper_value) < first
        True
    """

    def __init__(
        self,
        problem: Problem,
        solver: Solver[Any] | Auto,
        x0: Variables,
        y0: Variables | None = None,
        *,
        seed: int = 0,
    ) -> None:
        if solver == "auto":
            solver = plan(problem, x0, y0, seed=seed).solver()
        if not isinstance(solver, Solver):
            raise InvalidProblem(f"expected a Solver or 'auto', got {solver!r}.")
        self.solver = solver
        self._oracles, x, y = open_oracles(
            problem, x0, y0, seed=seed, needs_hvp=solver.needs_hvp, trains=solver.replays
        )
        self._state = solver.init(self._oracles, x, y)

    def step(self) -> Metrics:
        """Make one upper step and return what it saw.

        Raises:
            BilevelError: what the solver raises; the session then stands where it stood before.
        """
        state = self.solver.step(self._oracles, self._state)
        self.solver.inspect(self._oracles, state)
        self._state = state
        metrics: Metrics = self._state.metrics
        return metrics

    @property
    def x(self) -> Variables:
        """Upper variables now, structured like x0: a copy."""
        return self._oracles.x_layout.unflatten(self._state.x.clone())

    @property
    def y(self) -> Variables:
        """Lower variables now, structured like y0: a copy."""
        return self._oracles.y_layout.unflatten(self._state.y.clone())

    @property
    def counts(self) -> Counts:
        """Calls of the oracles so far."""
        return self._oracles.counts

    def state_dict(self) -> dict[str, Any]:
        """Return the solver's state as nested dicts of tensors and numbers, which `torch.load` opens `weights_only`."""
        return {"state": pack(self._state), "counts": dict(self.counts._asdict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` returned.

        Raises:
            InvalidProblem: it belongs to another solver, or to variables of other shapes.
        """
        loaded = unpack(state["state"])
        if type(loaded) is not type(self._state):
            raise InvalidProblem(
                f"the state is a {type(loaded).__name__}, this solver's a {type(self._state).__name__}."
            )
        for name in ("x", "y"):
            now, then = getattr(self._state, name), getattr(loaded, name)
            if now.shape != then.shape or now.dtype != then.dtype:
                raise InvalidProblem(
                    f"the state's {name} has shape {tuple(then.shape)} and {then.dtype}, this session's "
                    f"{tuple(now.shape)} and {now.dtype}."
                )
        self._state = loaded
        self._oracles.counts = Counts(**state["counts"])
