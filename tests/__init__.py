"""The tests. A package, because one that is installed beside this project has a top-level `tests` of its own."""
