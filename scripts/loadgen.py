#!/usr/bin/env python3
"""Run `kunserve loadgen` from a checkout: it puts load on any OpenAI-compatible server and measures it."""

from __future__ import annotations

import sys

from kunserve.loadgen.command import main

if __name__ == "__main__":
    sys.exit(main(prog="loadgen.py"))
