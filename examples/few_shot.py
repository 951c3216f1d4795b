"""Learn a start from which a small network tells five new letters apart after three steps on one picture of each."""

import argparse
import time
from importlib.util import find_spec

import bilevel
from bilevel.problems import glyphs
from bilevel.report import table

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--small", action="store_true", help="few steps: runs in seconds, learns little")
small = parser.parse_args().small

# Letters are pictures in twelve typefaces. The start is learned on tasks of Latin, Greek and Cyrillic letters, chosen
# on held-out ones of these, and judged on 1,000 tasks of Armenian and Georgian letters.
LR, STEPS = 0.4, 3
task = glyphs(lr=LR, lower_steps=STEPS)
choose = glyphs(lr=LR, lower_steps=STEPS, split="validation").evaluate


def learned(solver, seconds=0.0):
    """Learn a start; return the one that adapts best to the validation letters, and the seconds of its learning."""
    session, best, seconds = bilevel.Session(task.problem, solver, task.x0), (0.0, None), 0.0
    for _ in range(2 if small else 6):
        begin = time.process_time()
        for _ in range(3 if small else 50):
            session.step()
        seconds += time.process_time() - begin
        found = choose(session.x, None)["validation_accuracy"]
        best = max(best, (found, session.x), key=lambda pair: pair[0])
    return best[1], best[0], seconds


adam = bilevel.Adam(lr=0.003)
solvers = {
    "MAML": bilevel.maml(LR, STEPS, upper=adam),
    "first-order MAML": bilevel.maml(LR, STEPS, first_order=True, upper=adam),
    "Reptile": bilevel.reptile(LR, STEPS, upper=bilevel.SGD(0.5)),
}
starts, rows = {"fresh start": task.x0}, []
for name, solver in solvers.items():
    starts[name], validation, seconds = learned(solver)
    rows.append({"start": name, "validation": validation, "seconds": seconds})

counts = (0, 1, 3) if small else (0, 1, 2, 3, 5, 10)
judges = {steps: glyphs(lr=LR, lower_steps=STEPS, eval_steps=steps).evaluate for steps in counts}
curves = {name: [judge(x, None) for judge in judges.values()] for name, x in starts.items()}
rows.insert(0, {"start": "fresh start"})
for row in rows:
    for steps, numbers in zip(counts, curves[row["start"]], strict=True):
        row[f"test, {steps} steps"] = "{test_accuracy:.3f} ± {interval:.3f}".format(**numbers)
print("accuracy on tasks of five letters of scripts never seen, by gradient steps on one picture of each; guessing: 0.2")
print(table(rows))
if not small:
    after = {name: values[counts.index(STEPS)]["test_accuracy"] for name, values in curves.items()}
    assert after["MAML"] > after["first-order MAML"] > after["fresh start"] > 0.2

if find_spec("matplotlib"):
    from matplotlib.figure import Figure

    (support, _), (query, _) = glyphs.__globals__["judged_tasks"]("test")
