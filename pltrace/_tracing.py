"""What tracing consists of while it is on: the store, the recorder, the exporters with their workers, the callbacks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from pltrace._callbacks import CallbackRunner
from pltrace._clock import monotonic
from pltrace._config import Config
from pltrace._delivery import DeliveryWorker
from pltrace._encoding import Encoder
from pltrace._errors import StoreError
from pltrace._exporter import SpanExporter, TracksRequests
from pltrace._greenlets import rest
from pltrace._health import counts, failed, warn_once, warn_sometimes
from pltrace._operations import OperationWorker
from pltrace._recorder import SpanRecorder
from pltrace._rows import Rows
from pltrace._scope import Inherited, Scope, ScopeCopy
from pltrace._span import INERT_SPAN
from pltrace._store import Store
from pltrace._termination import expect_termination
from pltrace._trouble import STORE_TROUBLE, InterruptedUseError

__all__ = ["Tracing"]

#: How long the exit of a process waits for delivery; what is left is sent by the next process.
EXIT_S = 2.0
#: How long a flush waits for the disk at least, and how often a patient one tries again.
_WRITING_S, _TRY_AGAIN_S = 0.5, 0.05
#: What is delivered, or was only ever local, is kept so long, and up to a size; it is looked at more often in memory,
#: and the sooner the less is left: a busy program adds five megabytes a second, and more for a while.
_KEEP_S = 30 * 86_400.0
_FILE_BYTES, _MEMORY_BYTES, _OFF_BYTES = 2**30, 2**28, 2**24
_PRUNE_FILE_EVERY_S, _PRUNE_FULL_EVERY_S, _PRUNE_MEMORY_EVERY_S, _PRUNE_MORE_AFTER_S = 30.0, 0.25, 5.0, 0.04
_MOST_BYTES_A_SECOND = 2**25
#: While nothing of what is too much may go, because PromptLayer can't be reached.
_PRUNE_STUCK_EVERY_S = 10.0


class Tracing:
    """Composes the parts as a `Config` says.

    Args:
        config: The settings.
        before: What is replaced: its open blocks go on, and so does who waits for an id. What this records is delivered
            once it has ended, which `take_over` sees to.
        recorder: Makes what spans are recorded with.
    """

    def __init__(
        self,
        config: Config,
        before: Tracing | None = None,
        recorder: Callable[..., SpanRecorder] = SpanRecorder,
    ) -> None:
        self.config = config
        self.exporters = _exporters(config)
        self.store = self._open_store(before)
        self.callbacks = CallbackRunner()
        encoder = Encoder(config.redact, config.redact_also)
        self.recorder = recorder(
            self.store, encoder, self.callbacks, self._wrote, self._began, config.sample, config.service
        )
        self._writer = self.recorder.writer
        self.store.outbox.is_missing = lambda span_id: self.recorder.is_missing(int(span_id, 16))
        inherited = Inherited(self.recorder, config.tags, config.metadata, capture=config.capture)
        self.outermost: Scope = ScopeCopy(inherited, INERT_SPAN)
        self._deliveries = [
            # The exporter that gives ids alone decides that none will come.
            DeliveryWorker(
                self.store.outbox,
                exporter,
                self._resolved,
                self._gave_up if isinstance(exporter, TracksRequests) else _nobody_waits,
            )
            for exporter in self.exporters
        ]
        self._operations = [
            OperationWorker(self.store.outbox, exporter, exporter.name)
            for exporter in self.exporters
            if isinstance(exporter, TracksRequests)
        ]
        self._exit_left_s = self._patience_s = EXIT_S
        self._full_disk: Path | None = None  # The file that was given up at the end.
        self._lost = 0
        self._is_shut = False
        self._ended, self._ending_by, self._closes = threading.Event(), 0, True
        self._prune_at = monotonic()
        #: How often the lease was lost as far as is known, and the requests that others may have sent since.
        self._losses, self._taken = 0, set[int]()
        for worker in self._deliveries:
            worker.looked_round = self._looked_round
        self._before = before
        self._is_beside = before is not None and before.store.database is self.store.database
        if before is None:
            self._deliver_from_now_on()
            return
        self._writer.count_after(before.recorder.writer)
        if self._is_beside:
            self.recorder.succeed(before.recorder)

    def _deliver_from_now_on(self) -> None:
        self._before = None
        for worker in self._deliveries:
            worker.work()  # An earlier process may have left something.

    def take_over(self, timeout: float) -> None:
        """End what is replaced, while this records already."""
        before = self._before
        if before is not None:
            before.shutdown(timeout, patient=False, close=not self._is_beside)
            if not self._is_beside:
                self.recorder.succeed(before.recorder)
            self._deliver_from_now_on()

    @property
    def logs_requests(self) -> bool:
        """Whether PromptLayer is told of the LLM calls, and gives them ids."""
        return any(isinstance(exporter, TracksRequests) for exporter in self.exporters)

    def _open_store(self, before: Tracing | None) -> Store:
        names = [exporter.name for exporter in self.exporters]
        local_ids, account = not self.logs_requests, self.config.account
        path = None if isinstance(self.config.store, str) else self.config.store
        place = path if before is None or before.store.database.path != path else before.store.database
        try:
            return Store(place, names, local_ids=local_ids, account=account)
        except StoreError as error:
            warn_once(
                "no_store",
                "%s. Spans are kept in memory and lost with the process, unless they are delivered before. Set a "
                "writable file with PLTRACE_STORE or configure(store=...).",
                error,
            )
            return Store(None, names, local_ids=local_ids, account=account)

    def _began(self) -> None:
        """Start the threads of the workers, and what sees to the process's end, as long as that is possible."""
        if self._is_shut or self._before is not None:
            return
        for worker in (*self._deliveries, *self._operations):
            worker.start()
        expect_termination()

    def _wrote(self) -> None:
        """Let the workers know of a commit."""
        if self._is_shut:
            self._let_go()  # What ended late is for who comes next.
            return
        if self._before is not None:
            return  # Two at once would call the same exporter.
        for worker in self._deliveries:
            worker.work()
        self._work_on_operations()
        if self._writer.is_full or monotonic() >= self._prune_at:
            self._prune()

    def _prune(self) -> None:
        in_memory = self.store.database.path is None
        retention = self.store.retention
        every_s = _PRUNE_MEMORY_EVERY_S if in_memory else _PRUNE_FILE_EVERY_S
        self._prune_at = monotonic() + every_s  # Others needn't do it meanwhile.
        most_bytes = _OFF_BYTES if self.config.store == "off" else _MEMORY_BYTES if in_memory else _FILE_BYTES
        oldest_ns = self.recorder.now_ns() - int(_KEEP_S * 1e9)
        try:
            pruned = retention.prune(oldest_ns, most_bytes, is_full=self._writer.is_full)
            if pruned or not (in_memory or retention.is_through):
                every_s = _PRUNE_MORE_AFTER_S
            elif retention.is_stuck and not in_memory:
                every_s = _PRUNE_STUCK_EVERY_S
            else:
                every_s = min(every_s, max(retention.left / _MOST_BYTES_A_SECOND, _PRUNE_FULL_EVERY_S))
            if not pruned and in_memory and (dropped := retention.drop(_MEMORY_BYTES)):
                every_s = _PRUNE_MORE_AFTER_S
                counts["dropped_memory_full"] += dropped
                warn_sometimes(
                    "memory_full",
                    "pltrace drops spans: they are kept in memory alone, could not be delivered, and take more than "
                    "%d MB. Set a file with PLTRACE_STORE or configure(store=...).",
                    _MEMORY_BYTES >> 20,
                )
        except STORE_TROUBLE:
            every_s = _PRUNE_FULL_EVERY_S  # The disk is full or another process writes.
        except Exception:
            failed("pruning the store")
        self._prune_at = monotonic() + every_s

    def _resolved(self, ids: Mapping[str, int]) -> None:
        self.recorder.registry.resolve({int(span_id, 16): request_id for span_id, request_id in ids.items()})
        self._work_on_operations()

    def _work_on_operations(self) -> None:
        if self.store.asks:
            for worker in self._operations:
                worker.work()

    def _looked_round(self, adopted: int) -> None:
        if adopted:
            self.store.asks = True  # It may be operations alone.
            self._work_on_operations()
        if self._losses != self.store.lease.losses:
            self._losses, self._taken = self.store.lease.losses, self.recorder.registry.waiting()
        if self._taken:
            self._look_for_ids()

    def _look_for_ids(self) -> None:
        """Give out the ids that other processes got, which took over what this one had to deliver."""
        found = {span_bits: self.recorder.request_of(span_bits) for span_bits in self._taken}
        self._taken = {span_bits for span_bits, (number, can_come) in found.items() if number is None and can_come}
        self.recorder.registry.resolve({bits: number for bits, (number, _) in found.items() if number is not None})

    def _gave_up(self, span_id: str) -> None:
        self.recorder.registry.give_up(int(span_id, 16))
        self._work_on_operations()

    def flush(self, timeout: float, *, patient: bool) -> bool:
        """Store, deliver, and wait for callbacks and for what they ask; with what earlier processes left.

        Args:
            timeout: The longest wait in seconds.
            patient: Goes on waiting after an attempt to deliver has failed.

        Returns:
            Whether all that was recorded before is stored and delivered, and its callbacks are done.
        """
        deadline = monotonic() + timeout
        before = self._before
        if before is not None and not before.wait_for_end(deadline):
            return False  # What it has recorded may not be delivered.
        while True:
            try:
                is_all = not self.exporters or self._adopt(deadline)
                return self._flush_store(deadline, patient) and is_all
            except InterruptedUseError:
                return False  # Whoever waits for it here waits in vain.
            except STORE_TROUBLE:  # The disk may be full now and have room in a moment.
                if not patient or monotonic() >= deadline:
                    return False
            rest(_TRY_AGAIN_S)

    def _adopt(self, deadline: float) -> bool:
        """Take over what earlier processes left; return whether that could be done until then."""
        try:
            return self.store.lease.adopt_until(deadline)
        except STORE_TROUBLE:
            raise
        except Exception:
            failed("taking over what earlier processes left")
            return True

    def _flush(self, deadline: float, patient: bool) -> bool:
        try:
            return self._flush_store(deadline, patient)
        except STORE_TROUBLE:
            return False

    def _flush_store(self, deadline: float, patient: bool) -> bool:
        done = self._deliver(deadline, patient)
        done = self.callbacks.wait(deadline) and done
        if not done and (not patient or monotonic() >= deadline):
            return False
        # What the callbacks asked for.
        return self._deliver(deadline, patient) and done

    def _deliver(self, deadline: float, patient: bool) -> bool:
        # Writing takes milliseconds, and is owed to the caller however short its patience with the network is.
        if not self._writer.drain(max(deadline - monotonic(), _WRITING_S)):
            return False
        up_to = self.store.outbox.last()
        workers = (*self._deliveries, *self._operations)
        flushed = [worker.flush(up_to, deadline, patient=patient) for worker in workers]
        return all(flushed)

    def wait_for_end(self, deadline: float) -> bool:
        """Wait until it was shut down; return whether it was before a monotonic time."""
        # A signal handler may have interrupted the very thread that does it.
        return self._ending_by != threading.get_ident() and self._ended.wait(deadline - monotonic())

    def shutdown(self, timeout: float, *, patient: bool, close: bool = True) -> bool:
        """Flush, then let go of threads, connections, the lease on what is left, and the file.

        Args:
            timeout: The longest wait for the flush, in seconds.
            patient: As for `flush`.
            close: Whether the file is closed; another may use it.

        Returns:
            As `flush`.
        """
        self._ending_by, self._closes = threading.get_ident(), close
        try:
            return self._shut_down(timeout, patient)
        finally:
            self._ended.set()

    def _shut_down(self, timeout: float, patient: bool) -> bool:
        deadline = monotonic() + timeout
        if patient and self._closes and self.exporters:
            self._give_up_full_disk(deadline - EXIT_S)
        done = self._flush(deadline, patient)
        self._is_shut = True
        self._writer.retire()
        self.end_threads()
        self._leave()
        for exporter in self.exporters:
            _shut(exporter)
        return done

    def end_threads(self) -> None:
        """Let the threads end after what they are at; the writer's ends by itself at the end of the process."""
        self.callbacks.stop()
        for worker in (*self._deliveries, *self._operations):
            worker.stop()

    def at_exit(self, *, last: bool) -> None:
        """Put all on disk, deliver for a bounded time, and leave the rest to the next process.

        Args:
            last: It isn't called again.
        """
        self._writer.shutting_down()
        is_written = self._write_rest()
        is_kept_out = not is_written and self._writer.is_kept_out
        if is_kept_out and not last:
            return  # Others may let go of the file until then.
        if not is_written and self.exporters:
            self._give_up_disk()
        elif is_written and not self.store.database.is_open:
            return  # The child of a fork that recorded nothing, or it was shut down.
        # What is in memory alone, as it was set, or as there is no disk for it, has no other chance.
        in_memory = self.store.database.path is None
        hopeful = in_memory or not any(worker.pace.failures for worker in self._deliveries)
        if not self._is_shut and hopeful:
            began = monotonic()
            self._flush(began + self._exit_left_s, patient=False)
            self._exit_left_s -= monotonic() - began
        if not is_written or in_memory:
            self._count_lost()
        self._leave()

    def write_before_termination(self) -> None:
        """Put all on disk, as the process is being ended."""
        self._writer.shutting_down()
        self._write_rest()

    def deliver_before_termination(self, deadline: float) -> None:
        """Deliver what can be until a monotonic time, and leave the rest to other processes."""
        if self.store.database.is_open:  # Else it recorded nothing.
            if not (self._is_shut or self._writer.left or any(worker.pace.failures for worker in self._deliveries)):
                self._flush(deadline, patient=False)
            self._leave()

    def _write_rest(self) -> bool:
        """Write what is recorded, as long as it gets less; return whether all of it is on disk."""
        left = self._writer.left
        while not self._writer.drain(timeout=self._patience_s):
            if self._writer.left >= left:
                if not self._writer.is_kept_out:
                    self._patience_s = 0.0  # It is called twice: before other threads are waited for, and after.
                return False
            left = self._writer.left
        return True

    def _give_up_full_disk(self, deadline: float) -> None:
        """Go on in memory if nothing can be written any more, and it isn't others who keep the file.

        Args:
            deadline: Monotonic time, after which there is too little left to deliver from memory.
        """
        left = self._writer.left
        while monotonic() + EXIT_S < deadline and not self._writer.drain(timeout=EXIT_S):
            if self._writer.left >= left:
                if not self._writer.is_kept_out:
                    self._give_up_disk()
                return
            left = self._writer.left

    def _give_up_disk(self) -> None:
        """Go on in memory: what can be delivered needs no disk."""
        path = self.store.database.path
        if path is not None:
            with suppress(STORE_TROUBLE):  # A thread that is stuck keeps it.
                self.store.database.give_up_file()
                self._full_disk = path

    def _count_lost(self) -> None:
        """Count and tell what is neither on disk nor delivered."""
        lost, uncertain = self._writer.left, 0
        if self.store.database.path is None:
            with suppress(STORE_TROUBLE):
                pending, uncertain = self.store.outbox.count_pending()
                lost += pending
        more, self._lost = lost - self._lost, lost  # Of a second call; there can be less then, too.
        if not more:
            return
        counts["dropped_at_exit"] += more
        if more < 0:
            return
        path = self._full_disk or self.store.database.path
        warn_once(
            "left",
            "The process ends with %d spans in memory that pltrace could neither deliver nor keep %s: they are lost, "
            "but for %d on their way that may arrive.",
            lost,
            "(there is no file: set one with PLTRACE_STORE or configure(store=...))" if path is None else f"in {path}",
            uncertain,
        )
        for _ in range(2):  # The first try may find the disk full, and give up the reserve.
            with suppress(STORE_TROUBLE, OSError, StoreError):
                if self._full_disk is not None:
                    Store(path).write(Rows(), counts={"dropped_at_exit": more}, patience_s=_WRITING_S)
                    break

    def _leave(self) -> None:
        try:
            if not self._writer.is_kept_out or self._full_disk is not None:
                self._writer.write_counts()
        except STORE_TROUBLE:
            pass  # It was warned about.
        except Exception:
            failed("writing counts to the store")
        self._let_go()

    def _let_go(self) -> None:
        try:
            if self.exporters:
                self.store.lease.leave()
            if self._is_shut and self._closes:
                self.store.close()
        except STORE_TROUBLE:
            pass  # The lease ends by itself.
        except Exception:
            failed("leaving the store")

    def forked(self) -> None:
        """Start afresh in the child of a fork."""
        self._before = None  # What ends it is in the parent.
        self.recorder.after_fork_in_child()
        self.callbacks.forked()
        for worker in (*self._deliveries, *self._operations):
            worker.forked()
        for exporter in self.exporters:
            # Ours drops its connection, which the parent goes on using; it is no duty of users' own exporters.
            if isinstance(exporter, TracksRequests):
                exporter.forked()


def _nobody_waits(span_id: str) -> None:
    """Tell nobody that an exporter without ids set a span aside."""


def _shut(exporter: SpanExporter) -> None:
    try:
        exporter.shutdown()
    except Exception:
        failed(f"shutting down exporter {exporter.name}")


def _exporters(config: Config) -> tuple[SpanExporter, ...]:
    if config.api_key is None:
        if config.client is not None or config.base_url != Config.base_url:
            warn_once(
                "no_key",
                "pltrace has an address of PromptLayer (%s) but no API key: spans stay in the local store. Set "
                "PROMPTLAYER_API_KEY or configure(api_key=...).",
                config.base_url,
            )
        return config.exporters
    from pltrace._promptlayer import PromptLayerExporter

    exporter = PromptLayerExporter(config.api_key, config.base_url, config.client)
    return (exporter, *config.exporters)
