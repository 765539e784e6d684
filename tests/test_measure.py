"""The measure of the code: a function fits a screen, a file can be read in one go, a folder can be seen at a glance."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 420
MAX_MODULES = 16  # of a folder, its __init__.py included

ROOT = Path(__file__).parents[1]
FILES = sorted(path for folder in ("kunserve", "scripts", "tests") for path in (ROOT / folder).rglob("*.py"))


def place(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_every_function_fits_a_screen() -> None:
    found = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                num_lines = node.end_lineno - node.lineno + 1
                if num_lines > MAX_FUNCTION_LINES:
                    found.append(f"{place(path)}:{node.lineno}: {node.name} has {num_lines} lines")
    assert not found


def test_every_file_can_be_read_in_one_go() -> None:
    others = [path for kind in ("c", "js", "css", "html") for path in (ROOT / "kunserve").rglob(f"*.{kind}")]
    assert others
    num_lines = {place(path): len(path.read_text(encoding="utf-8").splitlines()) for path in [*FILES, *others]}
    assert not {path: num for path, num in num_lines.items() if num > MAX_FILE_LINES}


def test_every_folder_can_be_seen_at_a_glance() -> None:
    assert len(FILES) > 100
    num_modules = Counter(place(path.parent) for path in FILES)
    assert not {folder: num for folder, num in num_modules.items() if num > MAX_MODULES}
