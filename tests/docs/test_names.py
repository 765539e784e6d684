"""The documentation names only what there is: flags, metrics, routes, files, messages."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import flags_page
import metrics_page
import pytest

from kunserve.api.app import ROUTES

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
CHANGES = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
TEXTS["CHANGELOG.md"] = re.sub(r"^### Removed\n(?:(?!### ).*\n)*", "", CHANGES, flags=re.MULTILINE)  # what is no more
SECTIONS = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]  # the order of Keep a Changelog
OTHERS = {"--constraint", "--rm", "--gpus", "--ipc"}  # flags of pip and docker
FILES = re.compile(r"`((?:kunserve|engine|planner|gpu|scripts|tests|deploy|dev|docs)/[\w./-]*)`")
PLACEHOLDER = "…"


def commands_of_scripts() -> set[str]:
    """Flags that scripts declare."""
    sources = (path.read_text(encoding="utf-8") for path in (ROOT / "scripts").rglob("*.py"))
    return {flag for source in sources for flag in re.findall(r'"(--[\w-]+)"', source)}


@pytest.mark.parametrize("page", TEXTS)
def test_flags_exist(page: str) -> None:
    known = OTHERS | commands_of_scripts()
    for parser in flags_page.parsers():
        known |= {
            name for _, actions in flags_page.groups_of(parser) for action in actions for name in action.option_strings
        }
    assert not set(re.findall(r"(?<![\w-])--[a-z][\w-]+", TEXTS[page])) - known


@pytest.mark.parametrize("page", TEXTS)
def test_metrics_exist(page: str) -> None:
    families = list(metrics_page.families(metrics_page.metrics_of_everything()))
    known = {metrics_page.name_of(family) for family in families}
    known |= {sample.name for family in families for sample in family.samples}
    found = {name for name in re.findall(r"\b(?:vllm|kunserve):[a-z0-9_]+", TEXTS[page]) if not name.endswith("_")}
    assert not found - known


@pytest.mark.parametrize("page", TEXTS)
def test_files_exist(page: str) -> None:
    for name in FILES.findall(TEXTS[page]):
        assert (ROOT / name).exists() or (ROOT / "kunserve" / name).exists(), name


def test_every_route_is_on_the_page_of_the_api() -> None:
    text = TEXTS["docs/api.md"]
    routes = {f"{route.method} {re.sub(r':[^}]*', '', route.path)}" for route in ROUTES}
    assert len(routes) > 20
    assert not [route for route in routes if f"`{route}`" not in text]


def templates(tree: ast.Module) -> Iterator[str]:
    """All strings of a module; what is filled in is a placeholder."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else PLACEHOLDER for part in node.values)


def test_messages_of_the_page_of_troubles_are_those_of_the_server() -> None:
    sources = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "kunserve").rglob("*.py")]
    known = [text for tree in sources for text in templates(tree)]
    rows = re.findall(r"^\| (.*?) \|", TEXTS["docs/troubleshooting.md"], re.MULTILINE)
    messages = [text.replace("\\`", "`") for row in rows for text in re.findall(r"`((?:[^`\\]|\\`)+)`", row)]
    assert len(messages) > 25
    assert not [text for text in messages if not any(text in template for template in known)]


def test_changes_are_in_order_and_said_once() -> None:
    for release in CHANGES.split("\n## ")[1:]:
        sections = re.findall(r"^### (\w+)$", release, re.MULTILINE)
        assert sections == [section for section in SECTIONS if section in sections]
    entries = [entry.split() for entry in re.split(r"^- ", CHANGES, flags=re.MULTILINE)[1:]]
    begins = [" ".join(entry[:6]) for entry in entries]
    assert len(begins) > 100 and not [begin for begin in begins if begins.count(begin) > 1]
