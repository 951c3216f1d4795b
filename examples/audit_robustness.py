"""Audit a training: how much accuracy could 3 % of the training images cost, if each pixel may be off by 0.3?"""

import argparse

import bilevel
from bilevel.report import table

options = argparse.ArgumentParser(description=__doc__)
options.add_argument("--small", action="store_true", help="a few short trainings")
small = options.parse_args().small
TRAIN_STEPS, STEPS, STARTS = (20, 4, 1) if small else (150, 30, 3)

# x are 90 of 3,000 training images. The labels stay. The loss on 1,000 validation digits is driven up.
task = bilevel.problems.robustness_audit(train_steps=TRAIN_STEPS)
solution = bilevel.solve(task.problem, task.solver, task.x0, task.y0, steps=STEPS)
print(solution)

images = {
    "as they are": task.x0,
    "random changes": bilevel.problems.random_change(task),
    "worst changes found": solution.x,
}
rows = []
for name, x in images.items():  # from new starts, with new batches
    found = [task.evaluate(x, bilevel.problems.retrained(task, x, start)) for start in range(100, 100 + STARTS)]
    rows.append({"3 % of the images": name} | {key: sum(each[key] for each in found) / STARTS for key in found[0]})
print(table(rows))
fall = rows[0]["test_accuracy"] - rows[2]["test_accuracy"]
print(f"An audit finds a weakness or none; it proves no bound. This one found a fall of {100 * fall:.1f} points.")
assert rows[2]["test_loss"] > rows[0]["test_loss"]

try:
    from matplotlib import pyplot
except ImportError:
    print("no picture: matplotlib is not installed")
else:
    figure, axes = pyplot.subplots(2, 6, figsize=(7, 2.6), layout="constrained")
    for column, (before, after) in enumerate(zip(task.x0[:6], solution.x[:6], strict=True)):
        for axis, image in zip(axes[:, column], (before, after), strict=True):
            axis.imshow(image.view(28, 28).numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set_axis_off()
    figure.suptitle("Training images as they are, and the worst change found")
    figure.savefig("audit.png", dpi=150)
    print("audit.png")
