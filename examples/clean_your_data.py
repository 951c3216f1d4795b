"""Find wrong labels in your own data, with any network: bring arrays, and a few examples that you trust."""

import numpy as np
import torch
from torch import nn

import bilevel

# Your data: points of three classes, of which a third carries a random label. A few points were checked by hand.
random = np.random.default_rng(0)
centers = np.array([[0.0, 2.0], [2.0, -1.0], [-2.0, -1.0]])
true_labels = random.integers(3, size=300)
points = centers[true_labels] + random.normal(scale=0.8, size=(300, 2))
labels = np.where(random.random(300) < 0.33, random.integers(3, size=300), true_labels)
trusted_labels = random.integers(3, size=60)
trusted_points = centers[trusted_labels] + random.normal(scale=0.8, size=(60, 2))

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 3)).double()

# One weight per example is learned, so that the network trained on the weighted data does well on the trusted ones.
task = bilevel.problems.clean(points, labels, trusted_points, trusted_labels, net=net, decay=0.02)
# A network curves downwards here and there; damping 0.01 is more than that.
solver = bilevel.implicit(linear=bilevel.CG(damping=0.01), upper=bilevel.Adam(lr=0.3))
solution = bilevel.solve(task.problem, solver, task.x0, task.y0, steps=30)
print(solution)

kept = bilevel.problems.kept(solution.best_x).numpy()
wrong = labels != true_labels
print(f"wrong labels before: {wrong.mean():.0%} of {len(labels)}; after: {wrong[kept].mean():.0%} of {kept.sum()}")
assert wrong[kept].mean() < 0.3 * wrong.mean()
