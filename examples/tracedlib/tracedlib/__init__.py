"""Summaries of texts, with any LangChain model.

An example of a library that is decorated throughout. Who uses it sees nothing of that until the application switches
pltrace on, and then decides about it: `pltrace.configure(libraries={"tracedlib": {...}})`.
"""

from tracedlib._conversation import Conversation
from tracedlib._summaries import summarize, summarize_all, summarize_stream

__all__ = ["Conversation", "summarize", "summarize_all", "summarize_stream"]
