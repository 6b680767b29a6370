"""What is measured, by name; imported also where LangChain isn't."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ALONE", "CALLS_AT_ONCE", "LONG", "OF_ONE", "PARTS", "SECTIONS", "WORKLOADS", "Workload"]

#: Each measured in a process of its own, once: what some can only do before they are imported, memory, settings.
ALONE = ("off", "memory", "profile")
SECTIONS = ("calls", "paced", "threads", "total", "slow-server", "volume", *ALONE)
#: Measured where they are asked for, as they take minutes: a million decorated calls; a million LLM calls.
LONG = ("million", "million-llm")
#: What is measured of one tracer, once.
OF_ONE = {"slow-server": "log_request", **dict.fromkeys(("volume", *LONG), "pltrace")}
#: pltrace with more and more of it at work: what becomes of ended spans.
PARTS = ("dropped", "kept in a list", "stored", "delivered")
#: Decorated calls are too short to be timed one by one.
CALLS_AT_ONCE = 100


@dataclass(frozen=True)
class Workload:
    """One thing to measure.

    Attributes:
        name: As in the tables.
        kind: `langchain` runs get their tracer by themselves or by the config; `decorated` ones by decoration.
        calls: How many make one batch.
        at_once: How many operations one call is; times are of one operation.
        is_async: Whether it is awaited.
    """

    name: str
    kind: str
    calls: int
    at_once: int = 1
    is_async: bool = False


WORKLOADS = (
    Workload("LLM call", "langchain", 100),
    Workload("chain of 5 runs", "langchain", 50),
    Workload("agent of 61 runs", "langchain", 5),
    Workload("stream of 200 chunks", "langchain", 15),
    Workload("async LLM call", "langchain", 100, is_async=True),
    Workload("async chain of 5 runs", "langchain", 50, is_async=True),
    Workload("async stream of 200 chunks", "langchain", 15, is_async=True),
    Workload("decorated call", "decorated", 10, CALLS_AT_ONCE),
    Workload("decorated coroutine", "decorated", 10, CALLS_AT_ONCE, is_async=True),
    Workload("with block", "decorated", 10, CALLS_AT_ONCE),
    Workload("with block, declared before", "decorated", 10, CALLS_AT_ONCE),
    Workload("generator step", "decorated", 10, 1_000),
    Workload("async generator step", "decorated", 10, 1_000, is_async=True),
)
