"""What users install is what we test: the wheel, apart from the working tree, and the source archive."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Isolated (-I) and without site (-S), Python knows the standard library only: neither the working directory, nor the
# environment, nor the link that an editable installation leaves in site-packages. The wheel comes first; the packages
# it depends on (torch, numpy) come from where the tests found them, as a plain folder whose .pth files nobody reads.
PROBE = """
import json, sys
wheel, packages = sys.argv[1:]
sys.path += [wheel, packages]
import torch
import bilevel
from bilevel.cli import main
task = bilevel.problems.scalar()
solution = bilevel.solve(task.problem, bilevel.implicit(), task.x0, task.y0, steps=100)
assert main(["list"]) == 0
print(json.dumps({
    "bilevel": bilevel.__file__,
    "problems": bilevel.problems.__file__,
    "modules": [m.__file__ for n, m in sys.modules.items() if n.split(".")[0] == "bilevel"],
    "path": sys.path,
    "x": float(solution.x),
    "reference": float(task.problem.reference),
}))
"""


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Build the wheel from the tree, and the source archive."""
    folder = tmp_path_factory.mktemp("dist")
    for kind in ("--wheel", "--sdist"):
        command = [sys.executable, "-m", "build", kind, "--no-isolation", "--outdir", str(folder), str(ROOT)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return {"wheel": next(folder.glob("*.whl")), "sdist": next(folder.glob("*.tar.gz"))}


def sources() -> set[str]:
    """Return the files of the package as the wheel should name them."""
    files = [*(ROOT / "bilevel").rglob("*.py"), *(ROOT / "problems").rglob("*.py")]
    names = {str(file.relative_to(ROOT)) for file in files if "__pycache__" not in file.parts}
    return {f"bilevel/{name}" if name.startswith("problems/") else name for name in names}


def test_problems_are_linked_by_a_relative_link() -> None:
    link = ROOT / "bilevel" / "problems"
    assert link.is_symlink()
    assert str(link.readlink()) == "../problems"


def test_problems_are_imported_as_a_part_of_bilevel_only() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import problems"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "ImportError: import this package as bilevel.problems" in done.stderr


@pytest.mark.slow
def test_the_wheel_holds_the_whole_package_and_nothing_else(archives: dict[str, Path]) -> None:
    with zipfile.ZipFile(archives["wheel"]) as wheel:
        infos = {info.filename: info for info in wheel.infolist()}
        metadata = next(name for name in infos if name.endswith(".dist-info/METADATA"))
        text = wheel.read(metadata).decode()
        points = wheel.read(metadata.replace("METADATA", "entry_points.txt")).decode()
    assert {name for name in infos if name.endswith(".py")} == sources()
    assert "bilevel/py.typed" in infos
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in infos)
    assert {name.split("/")[0] for name in infos} == {"bilevel", metadata.split("/")[0]}
    # A link would be stored with its mode, as a file that holds its target.
    assert infos["bilevel/problems/__init__.py"].file_size == (ROOT / "problems" / "__init__.py").stat().st_size
    assert "Requires-Dist: torch" in text
    assert "bilevel = bilevel.cli:main" in points


@pytest.mark.slow
def test_the_source_archive_holds_real_files(archives: dict[str, Path]) -> None:
    with tarfile.open(archives["sdist"]) as sdist:
        members = {member.name.partition("/")[2]: member for member in sdist.getmembers()}
    assert sources() <= set(members)
    assert all(members[name].isreg() for name in sources())
    assert {"LICENSE", "README.md", "pyproject.toml", "bilevel/py.typed"} <= set(members)


@pytest.mark.slow
def test_the_wheel_works_apart_from_the_working_tree(archives: dict[str, Path], tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*install, str(archives["wheel"])], check=True, capture_output=True)
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-W", "error", "-c", PROBE, str(site), sysconfig.get_path("purelib")],
        cwd=elsewhere, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert Path(found["bilevel"]).parent == site / "bilevel"
    assert Path(found["problems"]).parent == site / "bilevel" / "problems"
    assert all(Path(name).is_relative_to(site) for name in found["modules"])
    assert str(ROOT) not in found["path"]
    assert found["x"] == pytest.approx(found["reference"], abs=1e-2)
