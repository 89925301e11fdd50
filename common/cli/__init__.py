"""`python -m prunelab ...`: one module a group of commands. What a command computes with is imported when it runs."""

from prunelab.common.cli import apply, comparing, measure, methods, preparing, rehearsing, runs, selecting
from prunelab.common.cli.app import app, main

__all__ = ["app", "apply", "comparing", "main", "measure", "methods", "preparing", "rehearsing", "runs", "selecting"]
