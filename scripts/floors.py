"""Imports go down only: a module may import from its own floor and from those below it (DESIGN in docs/decisions/001)."""

import ast
import sys
from pathlib import Path

FLOORS = (  # from the roof to the ground; what stands on one line shares a floor
    {"__init__", "__main__"},
    {"cli", "server", "studio", "cluster"},
    {"pipelines"},
    {"adapters"},
    {"diffusion"},
    {"schedulers", "models"},
    {"layers"},
    {"memory", "processing", "conversion", "noise", "outputs"},
    {"checkpoints"},
    {"configuration", "hub", "files"},
    {"errors", "public_names", "version"},
)
FLOOR = {name: height for height, floor in enumerate(reversed(FLOORS)) for name in floor}
SOURCE = Path(__file__).parent.parent / "src" / "suffuse"


def imported(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, module) of every import of the package, those inside functions included."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "suffuse":
            names = [node.module] if node.module != "suffuse" else [f"suffuse.{alias.name}" for alias in node.names]
            found += [(node.lineno, name) for name in names if name]
        elif isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names if alias.name.startswith("suffuse.")]
    return found


def breaches() -> list[str]:
    """One line for each import that goes up."""
    rows = []
    for path in sorted(SOURCE.rglob("*.py")):
        here = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        for line, module in imported(ast.parse(path.read_text())):
            there = module.split(".")[1]
            if there not in FLOOR or here not in FLOOR:
                rows.append(f"{path}:{line}: {here!r} or {there!r} stands on no floor; add it to FLOORS")
            elif FLOOR[there] > FLOOR[here]:
                rows.append(f"{path}:{line}: {here} imports {module}, which is above it")
    return rows


if __name__ == "__main__":
    found = breaches()
    print("\n".join(found) or "floors: imports go down only")
    sys.exit(bool(found))
