"""Programs that a language model wrote, run against tests: what they print for an input, or what a method of their
class `Solution` returns.

A program runs in a process of its own, in an empty folder, with no environment, and with limits of time, memory and
what it may write. That keeps mistakes from the machine and not malice: whoever runs it allows it (`allow`).
"""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prunelab.common.core.errors import PrunelabError

SECONDS = 6  # a test, as LiveCodeBench allows
MEMORY, WRITTEN = 4 << 30, 16 << 20  # bytes
Test = tuple[str, str]  # input and output

# Calls the method of a class `Solution`, and prints what it returns as JSON; arguments come one a line, as JSON.
_CALL = """
import json as _json, sys as _sys
_given = [_json.loads(line) for line in _sys.stdin.read().split("\\n") if line.strip()]
print("\\n" + _json.dumps(getattr(Solution(), {name!r})(*_given)))
"""
_IMPORTS = (
    "import sys, math, heapq, bisect, itertools, functools, collections, string, re, random\n"
    "from typing import *\nfrom collections import *\nfrom functools import *\nfrom itertools import *\n"
    "from heapq import *\nfrom bisect import *\nfrom math import *\nsys.setrecursionlimit(1 << 20)\n"
)


def allow(config: Mapping[str, Any]) -> None:
    """Raises PrunelabError unless the settings of this machine allow it."""
    if not config.get("programs"):
        raise PrunelabError(
            "answers are programs of a language model, which would be run here to be graded; allow it with"
            " --config programs=yes, in a container"
        )


def written(text: str) -> str | None:
    """The last program in fences of a text; None where there is none."""
    results = re.findall(r"```(?:[Pp]ython3?)?[ \t]*\n(.*?)```", text, re.DOTALL)
    return results[-1] if results else None


def passes(program: str, tests: Sequence[Test], function: str = "", seconds: float = SECONDS) -> bool:
    """Whether a program gives every output: what it prints, line by line and without spaces at the ends, or, with the
    name of a function, what that method of `Solution` returns, as JSON."""
    code = _IMPORTS + program + (_CALL.format(name=function) if function else "")
    for given, wanted in tests:
        printed = run(code, given, seconds)
        if printed is None:
            return False
        if function:
            try:
                if json.loads(printed.strip().rpartition("\n")[2]) != json.loads(wanted):
                    return False
            except ValueError:
                return False
        elif _lines(printed) != _lines(wanted):
            return False
    return True


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().split("\n")]


def run(code: str, given: str, seconds: float = SECONDS) -> str | None:
    """What code prints for an input; None where it fails or takes longer."""
    printed, failed = outcome(code, given, seconds)
    return None if failed else printed


def outcome(code: str, given: str = "", seconds: float = SECONDS) -> tuple[str, str]:
    """What code prints for an input, and the last line of what it says where it fails: empty where it does not."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_FSIZE, (WRITTEN, WRITTEN))
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 1))

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.py"
        path.write_text(code, encoding="utf-8")
        child = subprocess.Popen(
            [sys.executable, "-I", str(path)], cwd=folder, env={}, text=True, start_new_session=True, preexec_fn=limit,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            printed, errors = child.communicate(given, timeout=seconds)
        except subprocess.TimeoutExpired:
            return "", f"TimeoutError: it took more than {seconds:g} seconds"
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.communicate()
    lines = errors.strip().splitlines() or [f"it ended with code {child.returncode}"]
    return printed, lines[-1] if child.returncode else ""


# -- LiveCodeBench's tests -------------------------------------------------------------------------------------------


class _Plain(pickle.Unpickler):
    """Reads texts and nothing that would import."""

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"tests ask for {module}.{name}")


def tests_of(row: Mapping[str, Any]) -> tuple[tuple[Test, ...], str]:
    """The tests of a problem of LiveCodeBench, public ones and packed ones, and the name of the method they call."""
    held = list(json.loads(row["public_test_cases"]))
    packed = row.get("private_test_cases") or "[]"
    try:
        held += json.loads(packed)
    except ValueError:
        plain = _Plain(io.BytesIO(zlib.decompress(base64.b64decode(packed)))).load()
        held += json.loads(plain)
    function = str(json.loads(row.get("metadata") or "{}").get("func_name") or "")
    return tuple((str(test["input"]), str(test["output"])) for test in held), function
