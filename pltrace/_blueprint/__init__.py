"""Turns LangChain messages, generations and tool definitions into PromptLayer's Prompt Blueprint."""

from pltrace._blueprint._base import JsonEncoder
from pltrace._blueprint._prompts import (
    chat_answer,
    chat_prompt,
    completion_answer,
    completion_prompt,
    plain_chat,
    text_answer,
)
from pltrace._blueprint._tools import tooling_of, untold_of
from pltrace._blueprint._usage import Usage, counts_of, tokens

__all__ = [
    "JsonEncoder",
    "Usage",
    "chat_answer",
    "chat_prompt",
    "completion_answer",
    "completion_prompt",
    "counts_of",
    "plain_chat",
    "text_answer",
    "tokens",
    "tooling_of",
    "untold_of",
]
