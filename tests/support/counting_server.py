"""Stands in for PromptLayer in a process of its own where the numbers are large: it only counts, and can be slow."""

from __future__ import annotations

import argparse
import json
from collections import deque
from typing import Any
from urllib.request import ProxyHandler, build_opener

from . import child_process
from .http_double import Answer, HttpDouble, Request, slow

_STATE, _DELAY = "/__state__", "/__delay__"


class CountingServer(HttpDouble):
    """Takes all spans and answers with ids, and keeps of them no more than their numbers, but for the latest posts."""

    def __init__(self, port: int = 0) -> None:
        super().__init__(port)
        self.spans: set[int] = set()
        self.logged: set[int] = set()
        self.posts = 0
        self.again = 0
        self.latest: deque[dict[str, list[dict[str, Any]]]] = deque(maxlen=1_000)  # The spans of each, by trace.

    def answer(self, request: Request) -> Answer:
        """Takes a batch, or says how many there were."""
        with self.changed:
            self.requests.clear()  # Else they are all kept.
            if request.path == "/spans-bulk":
                return Answer(201, self._taken(request.json()["spans"]))
            if request.path == _STATE:
                counts = {"spans": len(self.spans), "request_logs": len(self.logged)}
                return Answer(200, {**counts, "posts": self.posts, "again": self.again})
            if request.path == _DELAY:
                seconds = float(request.query["seconds"])
                self.faults[:] = [lambda request: slow(seconds) if request.path == "/spans-bulk" else None]
                self.release()
                return Answer(200, {})
            trace_id = request.path.rpartition("/")[2]
            spans = [span for post in self.latest for span in post.get(trace_id, ())]
            if spans:
                return Answer(200, {"success": True, "trace_id": trace_id, "spans": spans})
        return Answer(404, {"success": False, "message": "There is no such path."})

    def _taken(self, spans: list[dict[str, Any]]) -> dict[str, Any]:
        self.posts += 1
        logs = []
        by_trace: dict[str, list[dict[str, Any]]] = {}
        for span in spans:
            span_id = span["context"]["span_id"]
            number = int(span_id, 16)
            self.again += number in self.spans
            self.spans.add(number)
            told = {"span_id": span_id}
            if "log_request" in span:
                self.logged.add(number)
                logs.append({"id": len(self.logged), "span_id": span_id})
                told["request_log_id"] = len(self.logged)
            by_trace.setdefault(span["context"]["trace_id"], []).append(told)
        self.latest.append(by_trace)
        return {"success": True, "spans": [], "request_logs": logs}


class CountingProcess(child_process.ChildServer):
    """A `CountingServer` in a process of its own."""

    def __init__(self) -> None:
        super().__init__("counting_server")

    def state(self) -> dict[str, int]:
        """Gives how many spans, request_logs and posts came, and how many spans came again."""
        state: dict[str, int] = self._get(_STATE)
        return state

    def delay(self, seconds: float) -> None:
        """Answers so late from now on, and lets go of who is waiting."""
        self._get(f"{_DELAY}?seconds={seconds}")

    def _get(self, path: str) -> Any:
        with build_opener(ProxyHandler({})).open(self.url + path, timeout=30) as answer:
            return json.load(answer)


def main() -> None:
    """Serves in a process of its own."""
    arguments = child_process.arguments(argparse.ArgumentParser(description=main.__doc__))
    with CountingServer(arguments.port) as server:
        child_process.serve(server.url, arguments)


if __name__ == "__main__":
    main()
