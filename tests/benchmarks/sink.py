"""A local server that takes whatever tracers send, in a process of its own: `python -m tests.benchmarks.sink`.

It prints its port, and ends with its standard input. To what is under `/slow` it answers after 50 ms. It gives
PromptLayer's answers to what pltrace posts; the strict stand-in of the tests would be what is measured.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys

_ids = itertools.count(1)


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            method, target, headers = _parsed(await reader.readuntil(b"\r\n\r\n"))
            body = await _body(reader, headers)
            answer = _answer(method, target, body)
            if target.startswith("/slow/"):
                await asyncio.sleep(0.05)
            status = "201 Created" if target.endswith("/spans-bulk") else "200 OK"
            head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(answer)}\r\n\r\n"
            writer.write(head.encode() + answer)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


def _parsed(head: bytes) -> tuple[str, str, dict[str, str]]:
    first, *lines = head.decode("latin-1").split("\r\n")
    method, target, _ = first.split(" ", 2)
    pairs = (line.partition(":") for line in lines if line)
    return method, target.partition("?")[0], {name.lower(): value.strip() for name, _, value in pairs}


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    if "chunked" not in headers.get("transfer-encoding", ""):
        return await reader.readexactly(int(headers.get("content-length", 0)))
    parts = []
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        parts.append(await reader.readexactly(size))
        await reader.readexactly(2)
    await reader.readuntil(b"\r\n")
    return b"".join(parts)


def _answer(method: str, target: str, body: bytes) -> bytes:
    if target.endswith("/spans-bulk"):
        spans = json.loads(body)["spans"]
        logs = [{"id": next(_ids), "span_id": span["context"]["span_id"]} for span in spans if "log_request" in span]
        return json.dumps({"success": True, "spans": [], "request_logs": logs}).encode()
    if target.endswith("/log-request"):
        return b'{"id": 1, "success": true, "prompt_version": null}'
    return _ANSWERS.get(target, b"{}")


#: What clients insist on finding.
_ANSWERS: dict[str, bytes] = {
    "/info": b'{"version": "0.13.0", "batch_ingest_config": {"use_multipart_endpoint": false, "size_limit": 100,'
    b' "size_limit_bytes": 20971520, "scale_up_qsize_trigger": 1000, "scale_up_nthreads_limit": 16}}',
    "/api/apikey/login": b'{"org_info": [{"id": "1", "name": "bench", "api_url": "", "proxy_url": "",'
    b' "realtime_url": "", "is_universal_api": true}]}',
    "/api/project/register": b'{"org": {"id": "1", "name": "bench"}, "project": {"id": "1", "name": "bench"}}',
    "/graphql": b'{"data": {"viewer": {"username": "bench", "defaultEntity": {"name": "bench"}},'
    b' "project": {"name": "benchmark"}}}',
    "/server_info": b'{"min_required_weave_python_version": "0", "trace_server_version": "0"}',
    "/obj/create": b'{"digest": "1"}',
    "/file/create": b'{"digest": "1"}',
}


async def _main() -> None:
    server = await asyncio.start_server(_serve, "127.0.0.1", 0, limit=2**26)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(_main())
