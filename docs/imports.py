"""Who imports whom in `fp4cast`, read from its source: for the picture of the architecture, and for its test."""

import ast
from pathlib import Path

import fp4cast

SOURCE = Path(fp4cast.__file__).parent
MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(SOURCE.rglob("*.py"))
}


def names_in(path: Path) -> set[str]:
    """Every dotted name that a file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imports_of(module: str) -> set[str]:
    """The modules of fp4cast that a module imports, without the leading `fp4cast.`."""
    found = set()
    for name in names_in(MODULES[module]):
        inside = name.removeprefix("fp4cast.")
        if inside != name:
            found.add(inside if inside in MODULES else inside.rpartition(".")[0] or "__init__")
    return found


def reach(module: str) -> set[str]:
    """Everything of fp4cast that a module imports, directly or not."""
    seen: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        if name in MODULES and name not in seen:
            seen.add(name)
            todo += imports_of(name)
    return seen - {module}


def room(module: str) -> str:
    """The folder of a module, or the module itself where it lies in none."""
    return module.partition(".")[0]
