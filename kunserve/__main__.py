"""`python -m kunserve`: the same commands as `kunserve`."""

from kunserve.cli import main

main()
