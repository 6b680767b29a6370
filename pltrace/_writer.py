"""Keeps the queue of what ended, and commits it to the store, on one background thread."""

from __future__ import annotations

import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import suppress

from pltrace._background import Background
from pltrace._backpressure import Backpressure
from pltrace._clock import monotonic
from pltrace._commit import Ask, Commit
from pltrace._encoding import Encoder
from pltrace._greenlets import new_lock, new_rlock, rest, sleep, taken
from pltrace._health import counts, failed, warn_sometimes
from pltrace._lease import LEASE_S
from pltrace._outbox import COUNTED_HERE
from pltrace._request import Registry
from pltrace._rows import Rows
from pltrace._silence import be_silent, silence
from pltrace._slices import Slices
from pltrace._span import Span
from pltrace._store import Asked, Store
from pltrace._trouble import STORE_TROUBLE, UNSTORABLE

__all__ = ["Writer"]

#: The writer waits so long for other processes before it counts as a try that failed, and warns after so long.
_PATIENCE_S = 1.0
_WARN_AFTER_S = 10.0
_TRY_AGAIN_S = 0.05
#: What Python says where the system gives no thread, and how long nobody asks for one then.
_NO_THREAD_LEFT, _START_AGAIN_S = "can't start new thread", 0.5
#: How long the writer gathers before it commits.
_GROUP_COMMIT_S = 0.002
_MOST_IN_COMMIT, _MOST_BYTES_IN_COMMIT = 500, 2**23
#: With so many waiting the writer is behind, and takes longer slices.
_BEHIND = 256
#: The writer looks so often whether there is something to gather, and sleeps after so many looks for nothing: where 100
#: calls a second come it stays awake. To wake it takes 15 µs of the caller's, a look 40 to 60 of its own.
_LOOK_EVERY_S, _MOST_LOOKS = 0.004, 3
#: What is counted in the commit of what it counts, whichever writer's that is.
_WITH_COMMITS = COUNTED_HERE | {"recorded"}


class Writer:
    """The queue of ended spans and what is asked of requests, and the thread behind it that writes them.

    Args:
        store: What is committed to.
        encoder: Bounds and redacts what is written.
        service: Names the application.
        registry: Who waits for ids of requests.
        wrote: Called after each commit.
        began: Called when the thread is started, by the first to record in a process.

    Attributes:
        queue: What waits; `put` adds to it.
        asleep: Whether the thread has to be roused.
        thread: The thread, if it runs.
        bound: Says how much may wait.
        is_kept_out: Whether it was others that kept the last commit from the file.
        is_full: Whether the disk had no room for the last commit.
    """

    def __init__(
        self,
        store: Store,
        encoder: Encoder,
        service: str,
        registry: Registry,
        wrote: Callable[[], None],
        began: Callable[[], None],
    ) -> None:
        self.store = store
        self.registry = registry
        self._encoder = encoder
        self._service = service
        self._wrote = wrote
        self._began = began
        self._retired = False
        self._process_counts = counts  # What the process counts, until another writer does the rest.
        self.start_afresh()

    def start_afresh(self) -> None:
        """Have nothing queued and no thread: in the child of a fork these are the parent's."""
        self.queue: deque[Span | Ask] = deque()
        self._writing = new_rlock()  # Held from taking items off the queue until they are committed,
        self._holder = 0  # and by which thread or greenlet; 0 is none.
        self._next = Commit()  # What is in flight: taken off the queue, and not committed yet.
        self.bound = Backpressure()
        self._taken = 0  # How many items were taken off the queue,
        self._settled = 0  # and of how many the commits are done.
        self.is_kept_out = self.is_full = False
        self.asleep = False
        self._wake = new_lock()
        self._wake.acquire()
        self.thread: Background | None = None
        self._starting = new_lock()
        self._start_after = 0.0
        # What the store has of the process's counts, or isn't this writer's.
        self._counted = Counter(self._process_counts)
        self._inline = False

    # The caller's path.

    def put(self, item: Span | Ask) -> None:
        """Take something to be written; never raises, never waits for a disk or a network."""
        queue = self.queue
        queue.append(item)
        if self.asleep or self.thread is None:
            self.rouse()
        if len(queue) > self.bound.most and self.bound.hold_up(queue, item):
            self.drop_newest()

    def rouse(self) -> None:
        """Wake the writer, or start it."""
        if self._inline:
            # Not for ever: a finalizer may have interrupted the very thread that is writing.
            if not self.bound.is_lifted:
                self.drain(timeout=0.5)
            return
        if self.thread is None or not self.thread.is_alive():
            self._start()
        self.asleep = False
        with suppress(RuntimeError):  # Another caller did.
            self._wake.release()

    def _start(self) -> None:
        if monotonic() < self._start_after or not self._starting.acquire(blocking=False):
            return  # Another caller does.
        try:
            if sys.is_finalizing():  # A thread that is started now never runs, and its starter waits for it.
                raise RuntimeError
            if self.thread is None or not self.thread.is_alive():
                writer = Background(self._write_forever, "pltrace-writer", is_users=self._encoder.is_users)
                self.thread = writer.start()
                # Not later: at the end of the process Python may allow no new thread.
                self._began()
        except RecursionError:
            pass  # Who records next, less deep, starts it.
        except RuntimeError as error:
            if str(error) == _NO_THREAD_LEFT:
                # The system has none now, as in a container with a limit; who records in a while tries again.
                self._start_after = monotonic() + _START_AGAIN_S
                self.bound.failed()
                return
            # The interpreter is shutting down and allows no new thread.
            self._inline = True
            self.drain(timeout=0.5)
        finally:
            self._starting.release()

    def drop_newest(self) -> None:
        """Give up what came last, and count it."""
        try:
            self.queue.pop()
        except IndexError:
            return
        self._drop("queue_full", 1)
        warn_sometimes(
            "queue_full",
            "pltrace drops spans: %d wait for %s and its disk doesn't keep up. `pltrace doctor` counts them.",
            len(self.queue),
            self.store.database.path,
        )

    # The writer's thread.

    def _write_forever(self) -> None:
        try:
            self._write_while_wanted()
        except BaseException:
            self.thread = None  # Whatever ended it, who records next starts another.
            raise

    def _write_while_wanted(self) -> None:
        be_silent()
        self.store.open(_PATIENCE_S)  # As in the child of a fork: whoever records meanwhile shares the first commit,
        self.drain()  # which waits for no others.
        looks = 0
        while True:
            if self.queue or self._next:
                if not looks:  # Else it has waited for the look.
                    sleep(_GROUP_COMMIT_S)
                looks = 0
                if self.drain():
                    continue
                if not self._inline:
                    sleep(_TRY_AGAIN_S)
                    continue
            if self._inline:
                return  # Those who record write.
            if self._retired:
                self.thread = None  # Before the last look: who records after it starts another.
                if self.queue:
                    continue
                return
            if looks < _MOST_LOOKS:
                looks += 1
                sleep(_LOOK_EVERY_S)
                continue
            looks = 0
            self.asleep = True
            # Looked at again after `asleep` is set: who recorded before that didn't wake us.
            if not self.queue:
                while not self._wake.acquire(timeout=LEASE_S / 4):
                    self._keep_lease()
            self.asleep = False

    def _keep_lease(self) -> None:
        """Renew it if that is time: whoever delivers may be at one batch for long."""
        try:
            self.store.lease.renew()
        except STORE_TROUBLE:
            pass  # Others write; next time.
        except Exception:
            failed("renewing the lease")

    def drain(self, timeout: float | None = None) -> bool:
        """Commit all that is queued now; from any thread.

        Args:
            timeout: How long it is tried, in seconds, and the writer waited for, which may be at it already. None
                waits for the writer, and tries once.

        Returns:
            Whether all is committed.
        """
        if timeout is None:
            with self._writing:
                return self._drain(None, 0.0)
        # What is taken off in between counts twice: then one more is waited for, or that nothing is left.
        up_to = len(self.queue) + self._taken
        give_up_at = monotonic() + timeout
        while True:
            left_s = max(give_up_at - monotonic(), 0.0)
            # The writer goes on as long as there is more: it may be done with ours.
            if taken(self._writing, min(left_s, _TRY_AGAIN_S)):
                try:
                    if self._holder in (0, threading.get_ident()):
                        return self._drain(up_to, give_up_at)
                finally:
                    self._writing.release()
                rest(_LOOK_EVERY_S)  # Another greenlet of this thread is at it.
            if self._settled >= up_to:
                return True
            if not left_s:
                return False

    def _drain(self, up_to: int | None, give_up_at: float) -> bool:
        """Commit what is queued, all of it or the first so many ever, with the lock held."""
        if self._holder:  # A signal handler or finalizer runs in the middle of it, on the same thread.
            return False
        self._holder = threading.get_ident()
        try:
            while (self.queue or self._next) and (up_to is None or self._settled < up_to):
                left_s = give_up_at - monotonic()
                if not self._commit(_PATIENCE_S if up_to is None else min(max(left_s, 0.0), _PATIENCE_S)):
                    if monotonic() + _TRY_AGAIN_S > give_up_at:
                        return False
                    rest(_TRY_AGAIN_S)
            return True
        except Exception:
            failed("writing spans to the store")
            return False
        finally:
            self._holder = 0

    def _commit(self, patience_s: float) -> bool:
        """Write up to `_MOST_IN_COMMIT` items, which count as in flight until they are committed.

        Args:
            patience_s: The longest wait for other processes.
        """
        self.bound.began()
        commit = self._next
        if not commit:
            with silence():  # This runs code of the user's: redactors, the `repr` of objects.
                self._encode(commit)
            self.bound.encoded(len(commit), commit.rows.characters)
        rows, operations = commit.rows, commit.operations
        others = self._new_counts()
        # With those of this commit: a process that is killed has no other for them.
        new_counts = Counter(others) + Counter(recorded=len(rows), runs_seen=commit.runs_seen)
        try:
            with silence():  # What we use may be instrumented, as `json` is in our own documentation.
                written = self.store.write(rows, operations, new_counts, patience_s)
        except UNSTORABLE:
            # One of them can't be stored, and would keep all others from it.
            written = self._write_each(rows, operations, new_counts)
        except Exception as error:
            self._cannot_write(error)
            return False
        self._counted.update(others)
        self._next = Commit()
        self._settled = self._taken
        self.bound.wrote(len(rows))
        self.is_kept_out = self.is_full = False
        counts["recorded"] += len(rows)
        self._tell(commit, written)
        return True

    def _write_each(self, rows: Rows, operations: list[Asked], new_counts: Mapping[str, int]) -> dict[int, int]:
        """Write one by one, giving up what can't be stored, and what was counted."""
        written: dict[int, int] = {}
        parts: list[tuple[Rows, list[Asked]]] = [(Rows([row]), []) for row in rows]
        parts += [(Rows(), [asked]) for asked in operations]
        for part in parts:
            try:
                with silence():
                    written.update(self.store.write(*part))
            except UNSTORABLE:
                self._drop("not_encodable", 1)
                failed("storing a span")
        self.store.write(Rows(), [], new_counts)
        return written

    def _new_counts(self) -> dict[str, int]:
        """Return what was counted, and is in no store yet; what was counted with a commit is."""
        return {reason: count - self._counted[reason] for reason, count in dict(self._process_counts).items()
                if count != self._counted[reason] and reason not in _WITH_COMMITS}  # fmt: skip

    def write_counts(self) -> None:
        """Put what was counted since the last commit into the store."""
        if not self._new_counts() or not taken(self._writing, _PATIENCE_S):
            return
        try:
            for _ in range(2):  # To write them may show that a file was lost, and what was in it counts too.
                if new_counts := self._new_counts():
                    self.store.write(Rows(), [], new_counts, _PATIENCE_S)
                    self._counted.update(new_counts)
        finally:
            self._writing.release()

    def _encode(self, commit: Commit) -> None:
        """Take items off the queue and encode them, one by one: what is encoded needn't be held any more."""
        most = min(_MOST_IN_COMMIT, self.bound.most)
        most_bytes = self.store.database.most_at_once(_MOST_BYTES_IN_COMMIT)
        queue = self.queue
        slices = Slices(long=len(queue) > _BEHIND)
        before = 0
        while queue and len(commit) < most and before < most_bytes:
            slices.between()
            item = queue[0]  # Only then taken off: what interrupts us must not lose it.
            try:
                commit.add(item, self._encoder, self._service, self.registry)
            except Exception:
                self._drop("not_encodable", 1)
                failed("encoding a span")
            self._taken += 1  # Before it is off the queue, or who counts both would miss it.
            queue.popleft()
            size, before = commit.rows.characters - before, commit.rows.characters
            self.bound.encoded_one(size)
        for totals in commit.totals.values():
            slices.between()
            totals.fold()

    def _cannot_write(self, error: Exception) -> None:
        """Keep what is in flight for the next try, and how many may wait behind it."""
        self.bound.failed()
        self.is_kept_out, self.is_full = "locked" in str(error), "full" in str(error)
        # That other processes write is no news before it lasts.
        if not self.is_kept_out or monotonic() > self.bound.wrote_at + _WARN_AFTER_S:
            warn_sometimes(
                "cannot_write",
                "pltrace can't write to the store %s (%s). Spans are kept in memory and it tries again; see that the "
                "disk has room and the file can be written.",
                self.store.database.path,
                error,
            )
        self._wrote()  # What was delivered may make room.

    def _tell(self, commit: Commit, written: Mapping[int, int]) -> None:
        """Register who waits for the ids of these requests, and give out those that are known already."""
        for trace_bits, span_bits, callbacks in commit.awaited:
            given_up = self.registry.expect(trace_bits, span_bits, callbacks)
            if given_up:
                counts["callbacks_given_up"] += given_up
        if written:
            self.registry.resolve(written)
        self._wrote()

    def _drop(self, reason: str, count: int) -> None:
        counts[f"dropped_{reason}"] += count

    # Its end.

    def count_after(self, before: Writer) -> None:
        """Put what is counted from now on into the store; what was counted so far is the earlier writer's to put."""
        before._process_counts = Counter(counts)
        self._counted = Counter(before._process_counts)

    def retire(self) -> None:
        """Let the writer's thread end when nothing is left to write; what still comes starts another."""
        self._retired = True
        with suppress(RuntimeError):  # It is awake.
            self._wake.release()

    @property
    def left(self) -> int:
        """How many spans and operations wait in memory to be written."""
        return len(self.queue) + len(self._next)

    def shutting_down(self) -> None:
        """From now on commit on the recording thread: the process may end before the writer wakes."""
        self._inline = True
        self.thread = None
        with suppress(RuntimeError):  # It is awake.
            self._wake.release()
