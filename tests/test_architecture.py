"""The shape of the code base: which part may import which, and how long a file may get."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("compiler", "ir", "passes", "codegen", "runtime")
LONGEST_FILE = 500

# What each folder may import of ours, as prefixes of module names.
ALLOWED = {
    "ir": ("tilewright.ir",),
    "passes": ("tilewright.ir", "tilewright.passes"),
    "codegen": ("tilewright.ir", "tilewright.codegen"),
    "runtime": ("tilewright.ir.program", "tilewright.runtime"),
    "compiler": ("tilewright",),
}


def sources(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, f"{folder} has no sources"
    return found


def package_of(path: Path) -> str:
    """The package that holds a source file: compiler/ is tilewright itself, the others hang beneath it."""
    parts = path.relative_to(ROOT).parent.parts
    return ".".join(("tilewright", *(parts[1:] if parts[0] == "compiler" else parts)))


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Every module of ours that a file imports, anywhere in it; ``from a import b`` counts as a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "tilewright")
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join((*parents, base) if base else parents)
            if base.split(".")[0] == "tilewright":
                yield from (f"{base}.{alias.name}" for alias in node.names)


def forbidden(source: str, package: str, allowed: tuple[str, ...]) -> list[str]:
    names = imported(ast.parse(source), package)
    return [n for n in names if not any(n == a or n.startswith(f"{a}.") for a in allowed)]


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_go_one_way(folder: str) -> None:
    wrong = {
        str(path.relative_to(ROOT)): names
        for path in sources(folder)
        if (names := forbidden(path.read_text(), package_of(path), ALLOWED[folder]))
    }
    assert not wrong


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("from tilewright.ir.program import Program", []),
        ("from .arena import Arena", []),
        ("from tilewright.ir import module", ["tilewright.ir.module"]),
        ("from ..ir.module import Module", ["tilewright.ir.module.Module"]),
        ("def f():\n    import tilewright.passes.base", ["tilewright.passes.base"]),
        ("import tilewright", ["tilewright"]),
    ],
)
def test_the_rule_sees_every_form_of_import(source: str, wrong: list[str]) -> None:
    assert forbidden(source, "tilewright.runtime", ALLOWED["runtime"]) == wrong


@pytest.mark.parametrize("folder", FOLDERS)
def test_nothing_is_imported_past_the_package(folder: str) -> None:
    """``import ir`` would work from the repository root, load a module twice and fail once installed."""
    for path in sources(folder):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert not {name.split(".")[0] for name in names} & set(FOLDERS), path


def test_no_file_is_too_long() -> None:
    patterns = ("*.py", "*.h", "*.cpp")
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for folder in FOLDERS
        for pattern in patterns
        for path in (ROOT / folder).rglob(pattern)
    }
    assert {path: n for path, n in lengths.items() if n > LONGEST_FILE} == {}


def test_every_package_is_installed() -> None:
    """A folder that pyproject.toml does not list would be missing from an installed tilewright."""
    import tomllib

    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {package_of(path / "_") for folder in FOLDERS for path in _package_folders(ROOT / folder)}
    assert packages == set(setuptools["packages"]) == set(setuptools["package-dir"])


def _package_folders(folder: Path) -> list[Path]:
    return [init.parent for init in folder.rglob("__init__.py")]
