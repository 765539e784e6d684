"""The measure of the code: a function fits a screen, a file can be read in one go, a folder can be seen at a glance."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 420
MAX_MODULES = 16  # of a folder, its __init__.py included

# Where one of these begins a docstring, a noun follows, or a sentence without its subject.
NO_VERBS = {
    "a", "all", "an", "any", "as", "at", "by", "each", "every", "for", "from", "half", "how", "if", "in", "its",
    "many", "more", "most", "no", "of", "on", "one", "only", "same", "so", "some", "that", "the", "their", "there",
    "these", "this", "those", "to", "two", "what", "when", "where", "whether", "which", "who", "whom", "whose",
    "why", "with",
}  # fmt: skip

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


def begins_with_no_verb(docstring: str) -> bool:
    """Return whether a docstring surely begins with no verb in the imperative, by the form of its first word.

    A noun in the plural ends in one s, as no such verb does. One in the singular is not found out: many are verbs as
    well, and a list of the others would never be complete.
    """
    word = docstring.split()[0].rstrip(".,:")
    return not re.fullmatch("[A-Z][a-z]+", word) or word.lower() in NO_VERBS or re.search("[^s]s$", word) is not None


@pytest.mark.parametrize(
    "docstring", ["The blocks.", "Blocks of a group.", "GET /load.", "`x`: what it is.", "Who waits."]
)
def test_first_words_that_are_no_verbs_are_found(docstring: str) -> None:
    assert begins_with_no_verb(docstring)


@pytest.mark.parametrize("docstring", ["Return the blocks.", "Begin.", "Begin, on a socket.", "Pass messages on."])
def test_verbs_are_let_through(docstring: str) -> None:
    assert not begins_with_no_verb(docstring)


def test_docstrings_of_functions_begin_with_a_verb() -> None:
    found = []
    for path in FILES:
        if place(path).startswith("tests/"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node)
                if docstring and begins_with_no_verb(docstring):
                    found.append(f"{place(path)}:{node.lineno}: {node.name}: {docstring.splitlines()[0]}")
    assert not found
