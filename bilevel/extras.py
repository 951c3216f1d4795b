"""Optional packages: what is missing, and the line that installs it."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType

from bilevel.status import MissingPackage


@dataclass(frozen=True)
class extra:
    """Import optional packages inside this context; one that is missing becomes an error with the install line.

    Args:
        name: the extra of pyproject.toml.
        needs: import name -> name of the package that is installed.
        user: what needs it, as the user knows it.

    Raises:
        MissingPackage: (an ImportError) one of them is not installed; errors inside an installed package pass through.

    Example:
        >>> with extra("plot", {"no_such_package": "no-such-package"}, "this picture"):
        ...     import no_such_package
        Traceback (most recent call last):
        bilevel.status.MissingPackage: this picture needs no-such-package: pip install 'bilevel[plot]'
    """

    name: str
    needs: dict[str, str]
    user: str

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Translate a missing package."""
        package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
        if package in self.needs:
            line = f"pip install 'bilevel[{self.name}]'"
            raise MissingPackage(f"{self.user} needs {self.needs[package]}: {line}") from error
