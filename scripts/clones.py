"""No ten lines stand twice: the same code, whatever the spacing, in two places of src.

Signatures, imports and docstrings do not count: the public keywords are spelled out in every class that answers to them.
"""

import ast
import sys
from collections import defaultdict
from pathlib import Path

LENGTH = 10
SOURCE = Path(__file__).parent.parent / "src"


def uncounted(tree: ast.AST) -> set[int]:
    """Line numbers of imports, docstrings and signatures."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        if text or isinstance(node, (ast.Import, ast.ImportFrom)):
            lines.update(range(node.lineno, node.end_lineno + 1))
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines.update(range(node.lineno, node.body[0].lineno))
    return lines


def clones() -> list[str]:
    """One line for each run of lines that stands twice."""
    places: dict[tuple[str, ...], list[tuple[Path, int]]] = defaultdict(list)
    for path in sorted(SOURCE.rglob("*.py")):
        text = path.read_text()
        skipped = uncounted(ast.parse(text))
        lines = [(i, " ".join(line.split())) for i, line in enumerate(text.splitlines(), 1) if i not in skipped]
        lines = [(i, line) for i, line in lines if any(c.isalnum() for c in line) and not line.startswith("#")]
        for start in range(len(lines) - LENGTH + 1):
            window = lines[start : start + LENGTH]
            places[tuple(line for _, line in window)].append((path, window[0][0]))
    return [" ~ ".join(f"{path}:{line}" for path, line in found) for found in places.values() if len(found) > 1]


if __name__ == "__main__":
    found = clones()
    print("\n".join(found) or f"clones: no {LENGTH} lines stand twice")
    sys.exit(bool(found))
