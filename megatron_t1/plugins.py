"""What can be added from outside, by name: one registry a kind, and the modules of the user's that fill them.

A built-in and a user's own register by the same decorator, `@PENALTIES.add`. The user's stand in modules of an
installed package, which `plugins: [my_package.rewards]` names in the config; they are imported while it is read, by
every process that reads it, and by the grader processes where they have something for these.

What is loaded is the process's, as any import is: `identity` says what, for whoever keeps results.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Generic, TypeVar, overload

T = TypeVar("T")
OWN = __name__.partition(".")[0]
_loaded: list[str] = []
_registries: list[Registry] = []


class Registry(Mapping[str, T], Generic[T]):
    """Name -> what is registered under it."""

    def __init__(self, kind: str, *, home: str = "", in_graders: bool = False) -> None:
        """
        Args:
            kind: for people: "penalty".
            home: our module whose import registers the built-in ones; it is imported when a name is not found.
            in_graders: grader processes use it.
        """
        self.kind, self.in_graders = kind, in_graders
        self._home = home
        self._entries: dict[str, T] = {}
        self.modules: dict[str, str] = {}
        """Name -> the module that registered it."""
        _registries.append(self)

    @overload
    def add(self, what: str) -> Callable[[T], T]: ...
    @overload
    def add(self, what: T) -> T: ...
    def add(self, what: str | T) -> T | Callable[[T], T]:
        """The decorator: `@X.add` registers under the function's name, `@X.add("name")` under another.

        Raises:
            ValueError: the name is taken.
        """
        module = sys._getframe(1).f_globals["__name__"]

        def register(function: T, name: str) -> T:
            if name in self._entries:
                raise ValueError(
                    f"{self.kind} {name!r} of {module} is there already, from {self.modules[name]}; take another name"
                )
            self._entries[name], self.modules[name] = function, module
            return function

        if isinstance(what, str):
            return lambda function: register(function, what)
        return register(what, what.__name__)  # type: ignore[attr-defined]

    def __getitem__(self, name: str) -> T:
        if name not in self._entries and self._home:
            importlib.import_module(self._home)
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def load(names: Iterable[str]) -> None:
    """Import the modules that `plugins` names; those that are loaded already stay as they are.

    Raises:
        ValueError: one of them can't be imported; the message ends with its own traceback.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:
            raise ValueError(f"plugins = {name} can't be loaded: {_told(error, name)}") from None
        if not any(sys.modules[part].__file__ for part in _packages(name)):
            raise ValueError(f"plugins = {name} is a folder without code: name a module in it, or add an __init__.py")
        if name not in _loaded:
            _loaded.append(name)


def _told(error: BaseException, name: str) -> str:
    """The traceback from the plugin's first line on; in one line what no line of the plugin raised."""
    if isinstance(error, ModuleNotFoundError) and error.name and (name + ".").startswith(error.name + "."):
        return f"{error}; install the package here, or put its folder on PYTHONPATH"
    told = traceback.TracebackException.from_exception(error)
    inside = [frame for frame in told.stack if frame.filename not in (__file__, importlib.__file__)]
    told.stack = traceback.StackSummary.from_list([f for f in inside if not f.filename.startswith("<frozen importlib")])
    return "\n" + "".join(told.format()).rstrip()


def for_graders() -> list[str]:
    """Modules of plugins that grader processes import: those that registered something which is used there."""
    used = {module for registry in _registries if registry.in_graders for module in registry.modules.values()}
    return sorted(module for module in used if module.partition(".")[0] != OWN)


def identity(modules: Iterable[str] | None = None) -> list[str]:
    """`name digest` of each loaded plugin (or of `modules`): its package's source files, whatever they are used for."""
    return [f"{name} {_digest(name)}" for name in (_loaded if modules is None else modules)]


def _packages(name: str) -> list[str]:
    """`a.b.c`: `a`, `a.b`, `a.b.c`."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _digest(name: str) -> str:
    """Of every .py file of the outermost package with code of its own, or of the module's file."""
    top = next(module for each in _packages(name) if (module := sys.modules[each]).__file__)
    assert top.__file__
    file, digest = Path(top.__file__), hashlib.sha256()
    for path in sorted(file.parent.rglob("*.py")) if hasattr(top, "__path__") else [file]:
        digest.update(str(path.relative_to(file.parent)).encode() + b"\0" + path.read_bytes() + b"\1")
    return digest.hexdigest()[:12]
