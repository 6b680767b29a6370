"""What pltrace costs who doesn't use it: `python -m tests.benchmarks.inert [--check]`.

Import time, and the time of calls of decorated functions and methods while tracing is off, beside the same without
pltrace, and beside wrapt alone, which does the wrapping. All of it is measured in turns in one run, so that whatever
else the machine does hits all alike. `--check` fails if a budget is exceeded.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import wrapt

from pltrace import traced

ROOT = Path(__file__).resolve().parents[2]

#: What pltrace may add: to wrapt's own import, in milliseconds, and to a call, in nanoseconds.
IMPORT_MS, FUNCTION_NS, METHOD_NS = 15.0, 60.0, 300.0

_TIMED_IMPORT = "import time; began = time.perf_counter(); import {}; print(time.perf_counter() - began)"
_BESIDE_WRAPT = "import wrapt; "
_TIMED_LIBRARY = """
import time, pltrace
source = "".join(f"@pltrace.traced\\ndef place{number}(): pass\\n" for number in range(1_000))
code = compile(source, "library", "exec")
began = time.perf_counter()
exec(code)
print(time.perf_counter() - began)
"""


def imports(rounds: int) -> dict[str, list[float]]:
    """Return the milliseconds of each import, each in fresh processes, in turns, from warm bytecode."""
    programs = {
        "import wrapt": _TIMED_IMPORT.format("wrapt"),
        "import pltrace": _TIMED_IMPORT.format("pltrace"),
        "import pltrace, wrapt is there": _BESIDE_WRAPT + _TIMED_IMPORT.format("pltrace"),
        "decorate 1,000 functions": _TIMED_LIBRARY,
    }
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PLTRACE_", "PROMPTLAYER_"))}
    kept.pop("PYTHONDONTWRITEBYTECODE", None)
    times: dict[str, list[float]] = {name: [] for name in programs}
    with tempfile.TemporaryDirectory() as folder:
        environment = {**kept, "PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": folder, "PYTHONHASHSEED": "0"}
        for warm in range(rounds + 1):
            for name, program in programs.items():
                out = subprocess.run(
                    [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
                ).stdout
                if warm:
                    times[name].append(float(out) * 1e3)
    return times


def calls(rounds: int) -> dict[str, list[float]]:
    """Return the nanoseconds of each call, in turns."""

    def function(number: int) -> int:
        return number

    def passing(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
        return wrapped(*args, **kwargs)

    class Class:
        def method(self, number: int) -> int:
            return number

        traced_method = traced(method)
        wrapt_method = wrapt.FunctionWrapper(method, passing)

    instance = Class()
    subjects = {
        "function": (function, "call(1)"),
        "function, traced": (traced(function), "call(1)"),
        "function, bare wrapt wrapper": (wrapt.FunctionWrapper(function, passing), "call(1)"),
        "method": (instance, "call.method(1)"),
        "method, traced": (instance, "call.traced_method(1)"),
        "method, bare wrapt wrapper": (instance, "call.wrapt_method(1)"),
    }
    number = 2_000
    timers = {name: timeit.Timer(call, globals={"call": subject}) for name, (subject, call) in subjects.items()}
    times: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(rounds):
        for name, timer in timers.items():
            times[name].append(timer.timeit(number) / number * 1e9)
    return times


def markdown(scale: float) -> str:
    """Return a table of all that is measured, with `scale` times the usual rounds."""
    rows = [(name, min(times), "ms") for name, times in imports(max(1, round(15 * scale))).items()]
    rows += [(name, min(times), "ns") for name, times in calls(max(1, round(1_000 * scale))).items()]
    return "| | least |\n|---|---:|\n" + "".join(f"| {name} | {least:.1f} {unit} |\n" for name, least, unit in rows)


def main() -> int:
    """Measure, print, and compare with the budgets."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="fail if a budget is exceeded")
    parser.add_argument("--imports", type=int, default=15, metavar="ROUNDS")
    parser.add_argument("--calls", type=int, default=1_000, metavar="ROUNDS")
    options = parser.parse_args()
    for name in ("PLTRACE_ENABLED", "PROMPTLAYER_API_KEY"):
        os.environ.pop(name, None)

    print(f"Python {sys.version.split()[0]}, wrapt {wrapt.__version__}; least (median) of the rounds\n")
    rounds = imports(options.imports)
    for name, times in rounds.items():
        print(f"{name:32}{min(times):8.1f} ms  ({statistics.median(times):.1f})")
    import_ms = min(rounds["import pltrace, wrapt is there"])

    rounds = calls(options.calls)
    least = {name: min(times) for name, times in rounds.items()}
    print()
    for name, times in rounds.items():
        ratio = least[name] / least[name.partition(",")[0]]
        print(f"{name:32}{least[name]:8.0f} ns  ({statistics.median(times):.0f})  x {ratio:.1f}")
    function_ns = least["function, traced"] - least["function"]
    method_ns = least["method, traced"] - least["method"]

    print()
    budgets = [
        ("import, over wrapt's own", import_ms, IMPORT_MS, "ms"),
        ("call of a function", function_ns, FUNCTION_NS, "ns"),
        ("call of a method", method_ns, METHOD_NS, "ns"),
    ]
    for name, added, budget, unit in budgets:
        print(f"{name:32}{added:+8.1f} {unit}  of {budget:.0f}{'' if added <= budget else '  EXCEEDED'}")
    return int(options.check and any(added > budget for _, added, budget, _ in budgets))


if __name__ == "__main__":
    sys.exit(main())
