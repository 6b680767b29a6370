"""Other tracers, each with what it takes to install it and to have it send to the benchmark's server."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from langchain_core.callbacks.base import BaseCallbackHandler, BaseCallbackManager

from tests.benchmarks.tracers import API_KEY, Tracer

__all__ = ["OFF", "PEERS", "interpreter"]


class Peer(Tracer):
    """A tracer of others'; `packages` is what it needs besides langchain-core."""

    packages: tuple[str, ...] = ()
    _decorator: Callable[..., Any] | None = None

    def decorate(self, function: Callable[..., Any]) -> Callable[..., Any] | None:
        """Return the function, traced by the peer's own decorator."""
        return None if self._decorator is None else self._decorator(function)


def _over_otlp(sink: str) -> Any:
    """Return a provider of OpenTelemetry's SDK that sends batches over OTLP."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider()
    # As large a queue as pltrace's, so that as few spans are dropped.
    exporter = OTLPSpanExporter(endpoint=f"{sink}/v1/traces")
    provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=10_000))
    return provider


class LangSmith(Peer):
    """LangSmith's own tracer, in LangChain itself."""

    name = "langsmith"
    packages = ("langsmith",)

    def __init__(self, sink: str, folder: Path, **mode: Any) -> None:
        super().__init__(sink, folder)
        import langsmith

        self._client = langsmith.Client(api_url=sink, api_key="lsv2_pt_benchmark", **mode)
        self._decorator = langsmith.traceable(client=self._client)

    def on(self) -> AbstractContextManager[Any]:
        """Enable it for a block."""
        import langsmith

        return langsmith.tracing_context(enabled=True, client=self._client, project_name="benchmark")

    def settle(self) -> None:
        """Wait for its threads."""
        self._client.flush()


class LangSmithOpenTelemetry(LangSmith):
    """The same with its spans over OTLP, and nowhere else."""

    name = "langsmith-otel"
    packages = ("langsmith[otel]",)

    def __init__(self, sink: str, folder: Path) -> None:
        self._provider = _over_otlp(sink)
        # What LANGSMITH_OTEL_ENABLED and LANGSMITH_OTEL_ONLY ask for.
        super().__init__(sink, folder, tracing_mode="otel", otel_tracer_provider=self._provider)

    def settle(self) -> None:
        """Wait for its threads, and then for the SDK's, which gets the spans from them."""
        super().settle()
        self._provider.force_flush()


class Langfuse(Peer):
    """Langfuse's callback handler."""

    name = "langfuse"
    packages = ("langchain", "langfuse")

    def __init__(self, sink: str, folder: Path) -> None:
        super().__init__(sink, folder)
        import langfuse
        from langfuse.langchain import CallbackHandler

        self._client = langfuse.Langfuse(public_key="pk-lf-benchmark", secret_key="sk-lf-benchmark", host=sink)
        self.callbacks = [CallbackHandler()]
        self._decorator = langfuse.observe()

    def settle(self) -> None:
        """Wait for its threads."""
        self._client.flush()


class _OverOpenTelemetry(Peer):
    """What instruments LangChain for OpenTelemetry, with the SDK's batches over OTLP."""

    _otlp = ("opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http")

    def __init__(self, sink: str, folder: Path) -> None:
        super().__init__(sink, folder)
        self._provider = _over_otlp(sink)
        self._instrumentor = self._make()

    def _make(self) -> Any:
        raise NotImplementedError

    @contextmanager
    def on(self) -> Iterator[None]:
        """Instrument LangChain for a block."""
        usual = BaseCallbackManager.__init__
        self._instrumentor.instrument(tracer_provider=self._provider)
        try:
            yield
        finally:
            self._instrumentor.uninstrument()
            # Traceloop's leaves it on, and what is measured without any tracer would have it too.
            BaseCallbackManager.__init__ = usual  # type: ignore[method-assign]

    def settle(self) -> None:
        """Wait for the SDK's thread."""
        self._provider.force_flush()


class OpenInference(_OverOpenTelemetry):
    """Arize's instrumentation."""

    name = "openinference"
    packages = ("openinference-instrumentation-langchain", *_OverOpenTelemetry._otlp)

    def _make(self) -> Any:
        from openinference.instrumentation.langchain import LangChainInstrumentor

        return LangChainInstrumentor()


class Traceloop(_OverOpenTelemetry):
    """Traceloop's instrumentation."""

    name = "traceloop"
    packages = ("opentelemetry-instrumentation-langchain", *_OverOpenTelemetry._otlp)

    def _make(self) -> Any:
        from opentelemetry.instrumentation.langchain import LangchainInstrumentor

        return LangchainInstrumentor()


class Braintrust(Peer):
    """Braintrust's callback handler."""

    name = "braintrust"
    packages = ("braintrust",)

    def __init__(self, sink: str, folder: Path) -> None:
        super().__init__(sink, folder)
        os.environ.update(BRAINTRUST_API_URL=sink, BRAINTRUST_APP_URL=sink, BRAINTRUST_API_KEY="sk-benchmark")
        import braintrust
        from braintrust.integrations.langchain import BraintrustCallbackHandler

        self._logger = braintrust.init_logger(project="benchmark", project_id="1")
        self.callbacks = [BraintrustCallbackHandler(logger=self._logger)]
        self._decorator = braintrust.traced

    def settle(self) -> None:
        """Wait for its threads."""
        self._logger.flush()


class Opik(Peer):
    """Comet's callback handler."""

    name = "opik"
    packages = ("opik",)

    def __init__(self, sink: str, folder: Path) -> None:
        super().__init__(sink, folder)
        os.environ.update(OPIK_URL_OVERRIDE=sink, OPIK_TRACK_DISABLE="false", OPIK_SENTRY_ENABLE="false")
        import opik
        from opik.integrations.langchain import OpikTracer

        self._opik = opik
        self.callbacks = [OpikTracer()]
        self._decorator = opik.track

    def settle(self) -> None:
        """Wait for its threads."""
        self._opik.flush_tracker()


class Weave(Peer):
    """W&B's own hook in LangChain, which makes a handler for each outermost run."""

    name = "weave"
    packages = ("weave",)

    def __init__(self, sink: str, folder: Path) -> None:
        super().__init__(sink, folder)
        os.environ.update(WANDB_BASE_URL=sink, WF_TRACE_SERVER_URL=sink, WANDB_API_KEY="benchmark")
        os.environ.update(WANDB_ERROR_REPORTING="false", WEAVE_SERVER_CACHE_DIR=str(folder / "weave"))
        os.environ["WEAVE_TRACE_LANGCHAIN"] = "false"  # Where it isn't set, `init` switches it on.
        import weave

        self._client = weave.init("benchmark")
        self._decorator = weave.op

    @contextmanager
    def on(self) -> Iterator[None]:
        """Let LangChain make its handlers inside a block."""
        os.environ["WEAVE_TRACE_LANGCHAIN"] = "true"
        try:
            yield
        finally:
            os.environ["WEAVE_TRACE_LANGCHAIN"] = "false"

    def settle(self) -> None:
        """Wait for its threads."""
        self._client.flush()


class MLflow(Peer):
    """MLflow's autologging, into files."""

    name = "mlflow"
    packages = ("langchain", "mlflow-skinny", "pandas")

    def __init__(self, sink: str, folder: Path) -> None:
        super().__init__(sink, folder)
        os.environ.update(MLFLOW_ENABLE_ASYNC_TRACE_LOGGING="true", MLFLOW_ALLOW_FILE_STORE="true")
        import mlflow

        self._mlflow = mlflow
        mlflow.set_tracking_uri(f"file://{folder / 'mlruns'}")
        self._decorator = mlflow.trace

    @contextmanager
    def on(self) -> Iterator[None]:
        """Log automatically inside a block."""
        self._mlflow.langchain.autolog(silent=True)
        try:
            yield
        finally:
            self._mlflow.langchain.autolog(disable=True, silent=True)

    def settle(self) -> None:
        """Wait for its threads."""
        self._mlflow.flush_trace_async_logging()


class _LogRequest(BaseCallbackHandler):
    """Posts each LLM call as it ends, as LangChain's former PromptLayer handler did."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._began: dict[Any, tuple[float, list[Any]]] = {}

    def on_chat_model_start(self, serialized: Any, messages: Any, *, run_id: Any, **_: Any) -> None:
        """Remember the prompt."""
        self._began[run_id] = time.time(), messages[0]

    def on_llm_end(self, response: Any, *, run_id: Any, **_: Any) -> None:
        """Post it with the answer."""
        began, messages = self._began.pop(run_id)
        prompt = [{"role": message.type, "content": [{"type": "text", "text": message.text}]} for message in messages]
        answer = {"role": "assistant", "content": [{"type": "text", "text": response.generations[0][0].text}]}
        self._client.log_request(
            provider="instant",
            model="instant",
            input={"type": "chat", "messages": prompt},
            output={"type": "chat", "messages": [answer]},
            request_start_time=datetime.fromtimestamp(began, timezone.utc).isoformat(),
            request_end_time=datetime.now(timezone.utc).isoformat(),
        )


class LogRequest(Peer):
    """promptlayer's own client, called as each LLM call ends; and its decorator."""

    name = "log_request"
    packages = ("promptlayer",)

    def __init__(self, sink: str, folder: Path) -> None:
        super().__init__(sink, folder)
        from promptlayer import PromptLayer

        self.callbacks = [_LogRequest(PromptLayer(api_key=API_KEY, base_url=sink))]
        self._tracing = PromptLayer(api_key=API_KEY, base_url=sink, enable_tracing=True)
        self._decorator = self._tracing.traceable()

    def settle(self) -> None:
        """Wait for the SDK's thread."""
        self._tracing.tracer_provider.force_flush()


PEERS: dict[str, type[Peer]] = {
    peer.name: peer
    for peer in (
        LangSmith,
        LangSmithOpenTelemetry,
        Langfuse,
        OpenInference,
        Traceloop,
        Braintrust,
        Opik,
        Weave,
        MLflow,
        LogRequest,
    )
}


def _without_langsmith(sink: str) -> Any:
    os.environ["LANGSMITH_TRACING"] = "false"
    import langsmith

    return langsmith.traceable


def _without_langfuse(sink: str) -> Any:
    import langfuse

    langfuse.Langfuse(public_key="pk-lf-benchmark", secret_key="sk-lf-benchmark", host=sink, tracing_enabled=False)
    return langfuse.observe()


def _without_braintrust(sink: str) -> Any:
    import braintrust

    return braintrust.traced


def _without_opik(sink: str) -> Any:
    os.environ["OPIK_TRACK_DISABLE"] = "true"
    import opik

    return opik.track


def _without_weave(sink: str) -> Any:
    os.environ["WEAVE_DISABLED"] = "true"
    import weave

    return weave.op


def _without_mlflow(sink: str) -> Any:
    import mlflow

    mlflow.tracing.disable()
    return mlflow.trace


def _without_promptlayer(sink: str) -> Any:
    from promptlayer import PromptLayer

    return PromptLayer(api_key=API_KEY, base_url=sink).traceable()


#: How a peer is switched off by its documentation, and what returns its decorator then.
OFF: dict[str, tuple[str, Callable[[str], Any]]] = {
    "langsmith": ("LANGSMITH_TRACING=false", _without_langsmith),
    "langfuse": ("Langfuse(tracing_enabled=False)", _without_langfuse),
    "braintrust": ("no logger", _without_braintrust),
    "opik": ("OPIK_TRACK_DISABLE=true", _without_opik),
    "weave": ("WEAVE_DISABLED=true", _without_weave),
    "mlflow": ("mlflow.tracing.disable()", _without_mlflow),
    "log_request": ("no enable_tracing", _without_promptlayer),
}


def interpreter(name: str, folder: Path) -> str:
    """Return the Python of a peer's own environment, which is made if it isn't there."""
    home = folder / name
    python = home / ("Scripts" if os.name == "nt" else "bin") / "python"
    done = home / "installed"
    if not done.exists():
        packages = ["langchain-core", *PEERS[name].packages]
        uv = shutil.which("uv")
        make = [uv, "venv", "-q", "--clear", "-p", sys.executable] if uv else [sys.executable, "-m", "venv", "--clear"]
        subprocess.run([*make, str(home)], check=True)
        install = [uv, "pip", "install", "-q", "-p", str(python)] if uv else [str(python), "-m", "pip", "install", "-q"]
        subprocess.run([*install, *packages], check=True)
        done.touch()
    return str(python)
