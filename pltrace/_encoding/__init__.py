"""Makes any Python value bounded, redacted and JSON-safe, and never raises."""

from pltrace._encoding._encoder import Encoder
from pltrace._encoding._leaves import Json, Redact
from pltrace._encoding._quick import json_of, quoted

__all__ = ["Encoder", "Json", "Redact", "json_of", "quoted"]
