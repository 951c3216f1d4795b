"""The pages say what is so: programs run, errors are as shown, the house is as drawn, every name is documented."""

from __future__ import annotations

import importlib.util
import math
import random
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bilevel
from bilevel import status as statuses
from bilevel.problems import distillation

DOCS = Path(__file__).parent.parent / "docs"
PACKAGE = Path(bilevel.__file__).parent
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
ONE = torch.ones(())


def table(page: str, header: str) -> list[list[str]]:
    """Return the cells of all tables of a page whose header line starts with `| header |`."""
    lines, rows = (DOCS / page).read_text().splitlines(), []
    for start, line in enumerate(lines):
        if line.startswith(f"| {header} |"):
            for row in lines[start + 2 :]:
                if not row.startswith("|"):
                    break
                rows.append([cell.strip() for cell in row.strip("|").split("|")])
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(DOCS)))
def test_programs_run(page: Path, run_page: Callable[[Path], dict[str, Any]]) -> None:
    run_page(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(DOCS)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


# -- errors.md: each row is provoked ------------------------------------------------------------------------------


def solve(
    x0: Any = ONE, y0: Any = ONE, *, solver: Any = None, steps: int = 1, lower: Any = None, upper: Any = None,
    options: dict[str, Any] | None = None, **fields: Any,
) -> bilevel.Solution:  # fmt: skip
    """Solve a small problem of which one part is wrong."""
    problem = bilevel.Problem(
        upper=upper or (lambda x, y, batch: (y - 3).square().sum() + 0 * total(x)),
        lower=lower or (lambda x, y, batch: (y - total(x)).square().sum()),
        **fields,
    )
    solver = bilevel.implicit() if solver is None else solver
    return bilevel.solve(problem, solver, x0, y0, steps=steps, **(options or {}))


def total(x: Any) -> torch.Tensor:
    if isinstance(x, torch.Tensor):
        return x.sum()
    leaves = x.values() if isinstance(x, dict) else x
    return sum((leaf.sum() for leaf in leaves), torch.zeros(()))


def in_place(x: Any, y: torch.Tensor, batch: Any) -> torch.Tensor:
    y += 1
    return (y - x).square()


def through_data(x: Any, y: torch.Tensor, batch: Any) -> torch.Tensor:
    y.data += 1
    return (y - x).square()


def batch_in_place(x: Any, y: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    batch += 1
    return (y - x).square() + batch.sum()


def running_statistics() -> bilevel.Solution:
    norm = torch.nn.BatchNorm1d(1)
    return solve(lower=lambda x, y, batch: (y - x).square() + norm(torch.ones(3, 1) * y).sum())


class Once(torch.autograd.Function):
    """A square whose backward may not be differentiated."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(value)
        return value.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0] * 2 * ctx.saved_tensors[0]


def once(x: torch.Tensor, y: torch.Tensor, batch: Any) -> torch.Tensor:
    square: torch.Tensor = Once.apply(y - x)
    return square


def resumed() -> bilevel.Solution:
    return solve(torch.ones(2), options={"resume": solve()})


def loaded() -> None:
    sessions = []
    for size in (1, 2):
        problem = bilevel.Problem(
            upper=lambda x, y, batch: y.square().sum(), lower=lambda x, y, batch: (y - x.sum()).square().sum()
        )
        sessions.append(bilevel.Session(problem, bilevel.implicit(), torch.ones(size), torch.ones(1)))
    sessions[1].load_state_dict(sessions[0].state_dict())


def saddle(x: torch.Tensor, y: torch.Tensor, batch: Any) -> torch.Tensor:
    return 0.5 * (y[0] - x).square() - y[1].square()


def stay() -> bilevel.HypergradientDescent:
    """Return a solver that leaves y where it is."""
    return bilevel.implicit(lower=bilevel.SGD(0.0), lower_steps=1)


def held(constraint: Any, solver: Any = None, **parts: Any) -> bilevel.Solution:
    """Solve a small problem whose lower level has a constraint."""
    return solve(solver=solver or bilevel.BLOCC(), constraint=constraint, **parts)


class Asked(bilevel.DataSource):
    """Gives another batch each time it is asked, whatever the step."""

    deterministic = False
    times = 0

    def batch(self, step: int, seed: int) -> torch.Tensor:
        self.times += 1
        return torch.tensor(float(self.times % 7 if self.times > 40 else 1))


LOGISTIC = bilevel.Problem(  # a step of length 1 is y -> x y (1 - y)
    upper=lambda x, y, batch: y.sum(), lower=lambda x, y, batch: ((1 - x) * y**2 / 2 + x * y**3 / 3).sum()
)
VIEW = torch.ones(3)
FAULTS: dict[str, Callable[[], Any]] = {
    "passed data without a source": lambda: solve(upper_data=(torch.ones(2), torch.ones(2))),
    "passed a number as x0": lambda: solve(1.0),
    "made x0 of integers": lambda: solve(torch.tensor(1)),
    "passed empty variables": lambda: solve(torch.ones(0)),
    "gave no start for y": lambda: solve(y0=None),
    "mixed float32 and float64": lambda: solve(y0=ONE.double()),
    "passed two views of one tensor": lambda: solve({"a": VIEW[:2], "b": VIEW[1:]}),
    "started from a NaN": lambda: solve(ONE * math.nan),
    "returned a float": lambda: solve(upper=lambda x, y, batch: y.item()),
    "forgot to reduce a loss": lambda: solve(y0=torch.ones(2), lower=lambda x, y, batch: (y - x).square()),
    "detached a loss": lambda: solve(lower=lambda x, y, batch: (y - x).square().detach()),
    "changed a variable in place": lambda: solve(lower=in_place),
    "changed a variable through .data": lambda: solve(lower=through_data),
    "changed the batch in place": lambda: solve(lower=batch_in_place, lower_data=bilevel.Full(torch.ones(2))),
    "left y out of the lower objective": lambda: solve(lower=lambda x, y, batch: x.square()),
    "left a leaf of x unused": lambda: solve(
        {"a": ONE, "b": ONE.clone()},
        lower=lambda x, y, batch: (y - x["a"]).square(),
        upper=lambda x, y, batch: y.square(),
    ),
    "used x as the start of training only": lambda: solve(
        y0=None,
        lower=lambda x, y, batch: (y - 1).square(),
        upper=lambda x, y, batch: y.square(),
        lower_init=lambda x: x,
    ),
    "used a module with running statistics": running_statistics,
    "had a loss that is NaN at the start": lambda: solve(upper=lambda x, y, batch: (y - 2).log()),
    "had a gradient that is NaN at the start": lambda: solve(lower=lambda x, y, batch: (y - x).abs().sqrt() * (y - x)),
    "gave an empty batch": lambda: solve(upper_data=bilevel.Full(torch.ones(0))),
    "gave a loader of length 0": lambda: bilevel.Loader([]),
    "gave a generator as a loader": lambda: bilevel.Loader(iter([torch.ones(1)])),
    "drew random numbers from elsewhere": lambda: solve(
        lower=lambda x, y, batch: (y - x).square() * (1 + random.random())
    ),
    "insisted on a second derivative that fails": lambda: solve(lower=once, hvp="double_backward"),
    "stated a lower set": lambda: solve(lower_set=bilevel.NonNegative()),
    "stated a lower constraint": lambda: solve(constraint=lambda x, y, batch: y.reshape(1)),
    "stated a lower term with kinks": lambda: solve(regularizer=bilevel.ElasticNet(0.1, 0.1)),
    "reduced a constraint to one number": lambda: solve(solver=bilevel.BLOCC(), constraint=lambda x, y, batch: y - x),
    "stated constraints that no y satisfies": lambda: held(lambda x, y, batch: y.square().reshape(1) + 1),
    "gave LVHBA nothing to project with": lambda: held(lambda x, y, batch: (y - x).reshape(1), bilevel.LVHBA()),
    "passed a solver without calling it": lambda: solve(solver=bilevel.implicit),
    "a value becomes NaN": lambda: solve(
        upper=lambda x, y, batch: y.square() + x.sqrt(), steps=5, solver=bilevel.implicit(upper=bilevel.SGD(10.0))
    ),
    "the lower objective is unbounded below": lambda: solve(lower=lambda x, y, batch: -(y - x).square() - y),
    "y is at a saddle": lambda: solve(y0=torch.ones(2), lower=saddle, solver=stay()),
    "the Hessian is singular": lambda: solve(
        y0=torch.ones(2), lower=lambda x, y, batch: (y[0] - x).square(), upper=lambda x, y, batch: y.sum() + 0 * x
    ),
    "a step of one's own loop meets a saddle": lambda: bilevel.hypergradient(
        bilevel.Problem(upper=lambda x, y, batch: y.square().sum(), lower=saddle), ONE, torch.ones(2)
    ),
    "the lower level is empty at an x": lambda: held(
        lambda x, y, batch: torch.stack([y + x - 2, -y]), steps=64, upper=lambda x, y, batch: (x - 9).square() + 0 * y
    ),
    "an equation is stated as its square": lambda: held(lambda x, y, batch: (y - 2 * x).square().reshape(1), steps=64),
    "batches depend on how often they were asked for": lambda: solve(
        lower=lambda x, y, batch: (y - x - 1e-3 * batch).square(), lower_data=Asked(), solver=bilevel.unrolled()
    ),
    "the derivative of a training step is infinite": lambda: solve(
        y0=ONE / 2,
        lower=lambda x, y, batch: (y - x / 2).abs() ** 1.5,
        solver=bilevel.unrolled(bilevel.SGD(0.1)),
        hvp="double_backward",
    ),
    "resumes with variables of another shape": resumed,
    "loads the state of another session": loaded,
    "let x act through round or argmax": lambda: solve(lower=lambda x, y, batch: (y - x.round()).square()),
    "used data of higher precision": lambda: solve(
        lower=lambda x, y, batch: (y - x * torch.ones(1).double()).square().sum()
    ),
    "differentiated through chaotic training": lambda: bilevel.metagradient(
        LOGISTIC, 4 * ONE, 0.3 * ONE, lower=bilevel.SGD(1.0), steps=40
    ),
    "asked whether such a gradient is of use": lambda: bilevel.metasmoothness(
        LOGISTIC, 3.7 * torch.ones(20), 0.3 * torch.ones(20), lower=bilevel.SGD(1.0), steps=60
    ),
    "used half precision": lambda: solve(ONE.half(), ONE.half()),
    "bounded multipliers too tightly": lambda: held(
        lambda x, y, batch: (y + x).reshape(1), bilevel.BLOCC(bound=0.1), steps=5
    ),
    "started at an x without feasible y": lambda: held(
        lambda x, y, batch: (x - y).reshape(1), x0=3 * ONE, lower_set=bilevel.Box(0.0, 1.0)
    ),
    "used an operation without a second derivative": lambda: solve(lower=once),
}
ROWS = table("errors.md", "You did") + table("errors.md", "What happens")


def test_every_row_is_provoked() -> None:
    assert [row[0] for row in ROWS] == list(dict.fromkeys(row[0] for row in ROWS))
    assert {row[0] for row in ROWS} == set(FAULTS)


@pytest.mark.parametrize(("what", "kind", "text"), ROWS, ids=[row[0] for row in ROWS])
def test_a_fault_gets_what_the_page_says(what: str, kind: str, text: str) -> None:
    kind, text = kind.strip("`"), text.strip("`")
    if kind.startswith("Status."):
        solution = FAULTS[what]()
        assert solution.status.name == kind.removeprefix("Status.")
        assert text in solution.message
        return
    expected = getattr(statuses, kind)
    if issubclass(expected, Warning):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.warns(expected, match=re.escape(text)):
                FAULTS[what]()
    else:
        with pytest.raises(expected, match=re.escape(text)):
            FAULTS[what]()


# -- tables that mirror the code -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mirror() -> Any:
    """Return docs/mirror.py as a module."""
    spec = importlib.util.spec_from_file_location("mirror", DOCS / "mirror.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["errors.md", "architecture.md"])
def test_tables_mirror_the_code(page: str, mirror: Any) -> None:
    assert (DOCS / page).read_text() == mirror.mirrored(page), "run `make pages`"


def test_every_module_is_in_the_house() -> None:
    drawn = {row[1].strip("`"): set(re.findall(r"`(\w+)`", row[2])) for row in table("architecture.md", "Floor")}
    for path in PACKAGE.rglob("*.py"):
        room, *rest = path.relative_to(PACKAGE).with_suffix("").parts
        if room != "__init__":
            assert room in drawn, f"{room} has no floor: add it to FLOORS in tests/test_architecture.py"
            assert set(rest) - {"__init__"} <= drawn[room] | {part.name for part in path.parents}


# -- api: every public name ----------------------------------------------------------------------------------------


def test_every_public_name_is_documented() -> None:
    text = "\n".join(path.read_text() for path in (DOCS / "api").glob("*.md"))
    documented = re.findall(r"^\.\. auto(?:class|function|exception):: (\S+)", text, re.MULTILINE)
    assert len(documented) == len(set(documented))
    assert {name for name in documented if "." not in name} == set(bilevel.__all__) - {"problems"}
    within = {name for name in documented if name.startswith("bilevel.problems.distillation.")}
    assert within == {f"bilevel.problems.distillation.{name}" for name in distillation.__all__}
    assert {name for name in documented if name.startswith("bilevel.problems.")} - within == {
        f"bilevel.problems.{name}" for name in bilevel.problems.__all__ if name != "ready"
    }
