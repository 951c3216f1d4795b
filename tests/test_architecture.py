"""The house of docs/architecture.md, enforced: imports point downward only, no cycles, no long files."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "bilevel"

# Ground first. A module may import from floors below its own, and from its own floor where that makes no cycle.
FLOORS = [
    {"status", "extras"},
    {"layout", "packing"},
    {"linear", "optimizers", "replay"},
    {"sets", "regularizers", "data", "modules", "space"},
    {"problem"},
    {
        "aggregated",
        "joint",
        "smoothness",
        "penalty",
        "moreau",
        "kkt_system",
        "linearization",
        "declared",
        "oracles",
        "multipliers",
        "feasibility",
        "lower_conditions",
        "lower_level",
        "second_order",
        "captured",
        "dry_run",
        "training",
    },
    {"hypergradients"},
    {"solvers"},
    {"solution", "callbacks", "progress", "report", "costs", "facts"},
    {"plan"},
    {"loop", "session", "plots"},
    {"tuning", "tune"},
    {"problems"},
    {"check", "compare", "demo", "integrations", "names"},
    {"cli"},
    {"__main__"},
]
OPTIONAL = {"matplotlib", "pandas", "tqdm", "sklearn", "mlxtend", "scipy", "optuna", "pyarrow"}
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def modules() -> dict[str, Path]:
    paths = [*ROOT.glob("*.py"), *(p for d in ROOT.iterdir() if d.is_dir() for p in sorted(d.rglob("*.py")))]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in paths}


def imported(path: Path) -> list[tuple[str, bool]]:
    """Return (module imported, whether inside a function) for every absolute import."""
    tree = ast.parse(path.read_text())
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert all(alias.name != "*" for alias in node.names), f"{path}: star import"
            names = [f"{node.module}.{a.name}" if node.module == "bilevel" else str(node.module) for a in node.names]
            found += [(name, id(node) in inside) for name in names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, id(node) in inside) for alias in node.names]
    return found


MODULES = modules()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_module_keeps_the_house_rules(name: str) -> None:
    path = MODULES[name]
    assert len(path.read_text().splitlines()) <= 400, "one file, one idea"
    room = name.split(".")[0]
    for target, inside in imported(path):
        package = target.split(".")[0]
        assert not inside or package in OPTIONAL, f"{name} imports {target} inside a function"
        assert inside or package not in OPTIONAL or room == "integrations", (
            f"{name} imports the optional {target} at the top"
        )
        if package != "bilevel" or name == "__init__":
            continue
        other = target.split(".")[1]
        assert room in FLOOR, f"{room} has no floor: add it to FLOORS and to docs/architecture.md"
        assert other in FLOOR, f"{name} imports {target}, which is on no floor"
        assert FLOOR[other] <= FLOOR[room], f"{name} imports {target}, which is upstairs"


def test_solvers_do_not_import_one_another() -> None:
    shared = {"bilevel.solvers._base", "bilevel.solvers.hypergradient_descent"}
    for name, path in MODULES.items():
        if name.startswith("solvers.") and not name.endswith("__init__"):
            siblings = {target for target, _ in imported(path) if target.startswith("bilevel.solvers")}
            assert siblings <= shared, f"{name} imports {siblings - shared}"


def test_imports_make_no_cycle() -> None:
    graph = {
        name.removesuffix(".__init__"): {
            target.removeprefix("bilevel.") for target, _ in imported(path) if target.startswith("bilevel.")
        }
        for name, path in MODULES.items()
        if name != "__init__"
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"cycle: {' -> '.join((*trail, name))}"
        if name not in done:
            for target in graph.get(name, ()):
                # A package's face imports its files; a file that imports its own package's face would close a circle.
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())
