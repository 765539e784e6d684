"""Write the pages of docs/ that are made from the code: flags, metrics, sizing.

python scripts/docs/make_pages.py            # after a change of a flag, a metric or the cost model
python scripts/docs/make_pages.py --check    # exit status 1, with the names of pages that are not what the code says
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ["KUNSERVE_CONFIG"] = os.devnull  # the user's own model cards are in no page

import flags_page
import metrics_page
import sizing_page

DOCS = Path(__file__).parents[2] / "docs"
PAGES: dict[str, Callable[[], str]] = {
    "flags.md": flags_page.page,
    "metrics.md": metrics_page.page,
    "sizing.md": sizing_page.page,
}


def stale(folder: Path = DOCS) -> list[str]:
    """Return the names of pages in a folder that differ from what the code says, or are missing there."""
    return [
        name
        for name, page in PAGES.items()
        if not (folder / name).is_file() or (folder / name).read_text(encoding="utf-8") != page()
    ]


def main() -> None:
    """Write the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is not up to date")
    if parser.parse_args().check:
        sys.exit(", ".join(stale()) or 0)
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
