"""Write docs/flags.md: every command's flags as its own parser knows them, and what becomes of vLLM's."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence

from markdown_tables import code, table

from kunserve.command import arguments, replay, top
from kunserve.command.flags import (
    ADMIN_KEY_VARIABLE,
    API_KEY_VARIABLES,
    LOG_LEVEL_VARIABLE,
    STATS_INTERVAL_VARIABLES,
)
from kunserve.command.vllm_flags import IGNORED, REFUSED, SAME
from kunserve.doctor import command as doctor
from kunserve.loadgen.arguments import build_parser
from kunserve.sim import __main__ as sim
from kunserve.sim.plan import command as plan

VARIABLES = {
    ", ".join(API_KEY_VARIABLES): "key of clients where no `--api-key` gives one; the first that is set counts",
    ADMIN_KEY_VARIABLE: "key of operators where no `--admin-key` gives one",
    LOG_LEVEL_VARIABLE: "level of the log where no `--log-level` gives one",
    ", ".join(STATS_INTERVAL_VARIABLES): "seconds between two summary lines of the log (10)",
    "KUNSERVE_CONFIG": "folder of the user's own model cards, in `models/` (`~/.config/kunserve`)",
    "KUNSERVE_CACHE": "folder of models that were fetched, compiled kernels and measured costs (`~/.cache/kunserve`)",
    "HF_HOME, HF_TOKEN": "cache and token of the Hugging Face Hub, as its own library reads them",
    "OPENAI_API_KEY": "key that `kunserve loadgen` sends where no `--api-key` gives one",
}


def parsers() -> tuple[argparse.ArgumentParser, ...]:
    """Return the parser of every command, the server's first."""
    return (
        arguments.make_parser("kunserve serve"),
        top.make_parser(),
        replay.make_parser(),
        build_parser("kunserve loadgen", ""),
        plan.make_parser(),
        doctor.make_parser(),
        sim.make_parser(),
    )


def page() -> str:
    """Return the page as Markdown."""
    lines = [
        "# Flags",
        "",
        "`kunserve COMMAND --help` shows the same. Flags may also stand in a YAML file (`--config FILE`), one",
        "`name: value` a line; those of the command line override it. Sizes take `KiB`, `MiB`, `GiB`.",
    ]
    for parser in parsers():
        lines += ["", f"## {parser.prog}", "", *_sections(parser)]
    lines += ["", "## Environment", "", *table(("variable", "what it is"), _rows(VARIABLES))]
    lines += ["", "## vLLM's flags", "", *_vllm()]
    return "\n".join(lines) + "\n"


def groups_of(parser: argparse.ArgumentParser) -> Iterator[tuple[str, list[argparse.Action]]]:
    """Yield the title of each group of a parser, and all its flags, with those that the help leaves out."""
    for group in parser._action_groups:  # argparse shows its groups to nobody else
        yield group.title or "", list(group._group_actions)


def shown(parser: argparse.ArgumentParser) -> Iterator[tuple[str, list[argparse.Action]]]:
    """Yield the title of each group of a parser, and its flags, but for those that the help leaves out."""
    for title, flags in groups_of(parser):
        if actions := [action for action in flags if action.help != argparse.SUPPRESS]:
            yield title, actions


def _sections(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield a table for each group of flags; a command without groups of its own has one."""
    groups = dict(shown(parser))
    own = {title: actions for title, actions in groups.items() if title not in ("options", "positional arguments")}
    plain = [action for title, actions in groups.items() if title not in own for action in actions]
    for title, actions in {"": plain, **own}.items():
        rows = [(code(_invocation(parser, action)), _help(parser, action)) for action in actions]
        yield from (["", f"### {title[0].upper()}{title[1:]}", ""] if title else [])
        yield from table(("flag", "what it does"), rows)


def _invocation(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """Return a flag with its value, as the help writes it."""
    return parser._get_formatter()._format_action_invocation(action)


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """Return the text of a flag with its default filled in, as the help writes it."""
    return parser._get_formatter()._expand_help(action) if action.help else ""


def _rows(texts: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(code(names), text) for names, text in texts.items()]


def _vllm() -> Iterator[str]:
    """Yield what becomes of the flags of `vllm serve` that KunServe has no use for."""
    yield "Command lines of `vllm serve` work as they are. Flags that change nothing are taken, with a warning that"
    yield "says why; flags that ask for what this server cannot do end the start, with the reason."
    yield from ("", *table(("taken, because", "flags"), _by_reason(IGNORED)))
    yield from ("", "Some are taken with one value, and refused with any other:", "")
    yield from table(("flag", "values"), [(code(flag), code(", ".join(values))) for flag, values in SAME.items()])
    yield from ("", *table(("refused, because", "flags"), _by_reason(REFUSED)))


def _by_reason(flags: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    return [(why, code(", ".join(names))) for why, names in flags.items()]
