"""Search the operations of a small cell by DARTS, and train what it finds beside random cells."""

import argparse
import time

import torch

import bilevel
from bilevel.problems import cell_search, discrete_cell
from bilevel.problems.cells import EDGES, OPERATIONS
from bilevel.report import table

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--small", action="store_true", help="a few seconds instead of a minute")
parser.add_argument("--seed", type=int, default=0, help="of the data split, the starts and the random cells")
options = parser.parse_args()
steps, epochs, cells = (20, 2, 2) if options.small else (150, 20, 8)

# 500 digits train the weights, 500 choose the operations; 797, which no search sees, judge the cells trained anew.
task = cell_search(options.seed, epochs=epochs, random_cells=0)


def judged(name, x, y, seconds):
    """Return a row of the table: the cell that x stands for, trained anew, and how sharp f is in x."""
    found = task.evaluate(x, y)
    return {
        "cell": name, "test_accuracy": found["test_accuracy"], "eigenvalue": found["eigenvalue"], "seconds": seconds,
        "operations": ", ".join(f"{edge.source}-{edge.node} {edge.operation}" for edge in discrete_cell(x)),
    }  # fmt: skip


rows, found = [], {}
generator = torch.Generator().manual_seed(options.seed)
for index in range(cells):
    x = torch.randn(task.x0.shape, generator=generator)
    rows.append(judged(f"random {index}", x, task.y0, 0.0) | {"eigenvalue": None})
for order in (1, 2):
    # The paper's rate of 3e-4 is made for twenty thousand steps.
    solver = bilevel.darts(0.05, order=order, upper=bilevel.Adam(0.02, betas=(0.5, 0.999), weight_decay=1e-3))
    start = time.process_time()
    solution = bilevel.solve(task.problem, solver, task.x0, task.y0, steps=steps)
    found[order] = solution.x.softmax(-1)
    rows.append(judged(f"DARTS, order {order}", solution.x, solution.y, time.process_time() - start))
print(table(rows))
random = torch.tensor([row["test_accuracy"] for row in rows[:cells]])
print(f"\nrandom cells: {random.mean():.1%} on average, {random.min():.1%} to {random.max():.1%}")

try:
    import matplotlib
except ImportError:
    print("no picture without matplotlib")
else:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for axis, (order, weights) in zip(axes, found.items(), strict=True):
        image = axis.imshow(weights.tolist(), vmin=0, vmax=1, cmap="magma")
        axis.set_title(f"order {order}")
        axis.set_xticks(range(len(OPERATIONS)), OPERATIONS, rotation=30, ha="right")
        axis.set_yticks(range(len(EDGES)), [f"{source} to {node}" for source, node in EDGES])
    figure.colorbar(image, ax=axes, label="weight of the operation")
    figure.savefig("search_a_cell.png", dpi=150)
    print("weights of all operations: search_a_cell.png")
