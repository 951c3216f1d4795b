"""Braess's paradox: limit the traffic on a shortcut, and everyone arrives sooner. A lower level with constraints."""

import argparse

import torch

import bilevel
from bilevel.report import table

# One unit of traffic goes from s to t over five roads, each driver by the way that is shortest for him alone:
#
#     s --y0--- a --1 + 0.1 y3-- t      The time on s-a and b-t is the traffic on it; s-b and a-t are wide and long, and
#     s --1 + 0.1 y1-- b --y4--- t      the shortcut a-b takes 0.1 y2. What limit x on the shortcut is best for all?
ROADS = ["s-a", "s-b", "a-b", "a-t", "b-t"]
fixed = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0], dtype=torch.float64)  # hours
by_traffic = torch.tensor([1.0, 0.1, 0.1, 0.1, 1.0], dtype=torch.float64)  # hours per unit of traffic
LEAST = 0.1  # residents need the shortcut


def potential(x, y, batch):
    """Selfish drivers minimize, all together, the sum of integrals of the times."""
    return fixed @ y + 0.5 * by_traffic @ y.square()


def total_time(x, y, batch):
    """The planner minimizes the time of all."""
    return (fixed + by_traffic * y) @ y


def conservation(x, y, batch):
    """What enters a crossing leaves it."""
    return torch.stack([y[0] + y[1] - 1, y[0] - y[2] - y[3], y[1] + y[2] - y[4]])


problem = bilevel.Problem(
    upper=total_time,
    lower=potential,
    equality=conservation,
    constraint=lambda x, y, batch: torch.cat([(y[2] - x)[None], -y]),  # the limit, and no driving backwards
    upper_set=bilevel.Box(LEAST, 1.0),
)
x0 = torch.tensor(0.5, dtype=torch.float64)
y0 = torch.tensor([0.9, 0.1, 0.8, 0.1, 0.9], dtype=torch.float64)

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--small", action="store_true", help="without the reference solver, which takes ten seconds")
small = parser.parse_args().small
solvers = {"BLOCC": (bilevel.BLOCC(), 100)} | ({} if small else {"KKT": (bilevel.KKT(), 2)})


def hours(limit):
    """Return the time of all when drivers choose for themselves."""
    return float(bilevel.solve_lower(problem, torch.as_tensor(limit, dtype=x0.dtype), y0).upper_value)


rows = []
for name, (solver, steps) in solvers.items():
    solution = bilevel.solve(problem, solver, x0, y0, steps=steps)
    held = bilevel.conditions(problem, solution.x, solution.y, solution.state.multiplier)
    rows.append(
        {
            "solver": name, "limit": float(solution.x), "hours": hours(solution.x),
            "toll that would do": float(held.constraint_multiplier[0]), "violation": float(held.lower_violation),
            "lower stationarity": float(held.stationarity), "status": solution.status.name.lower(),
        }
    )  # fmt: skip
print(table(rows))
print("hours by limit:", ", ".join(f"{limit:.1f}: {hours(limit):.3f}" for limit in (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)))
print("traffic at the best limit:", dict(zip(ROADS, solution.y.numpy().round(2).tolist(), strict=True)))
assert all(abs(row["limit"] - LEAST) < 1e-3 and row["hours"] < hours(1.0) - 0.3 for row in rows)
