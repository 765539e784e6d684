"""Shared by all tests. This file also puts `tests/` on the path, for helpers such as `tiny_models`."""

from hypothesis import settings

# The same examples in every run, and no failures because a machine is slow.
settings.register_profile("kunserve", deadline=None, derandomize=True, database=None)
settings.load_profile("kunserve")
