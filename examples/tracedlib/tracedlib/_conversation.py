"""A class: methods, a classmethod, and a block inside a method."""

from __future__ import annotations

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AnyMessage, HumanMessage, SystemMessage

from pltrace import traced


class Conversation:
    """Questions about a text, which remembers what was said.

    Args:
        model: Answers.
        text: What is asked about.
        name: Groups its calls in PromptLayer.
    """

    def __init__(self, model: BaseChatModel, text: str, name: str) -> None:
        self.model = model
        self.name = name
        self.messages: list[AnyMessage] = [SystemMessage(f"Answer from this text alone: {text}")]

    @traced("tracedlib.Conversation.about")
    @classmethod
    def about(cls, model: BaseChatModel, text: str) -> Conversation:
        """Return a conversation that is named by the model itself."""
        name = model.invoke(f"Name this text in one word: {text}").content
        return cls(model, text, str(name))

    @traced("tracedlib.Conversation.ask")
    def ask(self, question: str) -> str:
        """Return the answer to a question."""
        self.messages.append(HumanMessage(question))
        # What is known only when it runs goes into a block.
        with traced("tracedlib.answer", session=self.name, metadata={"turn": len(self.messages) // 2}):
            answer = self.model.invoke(self.messages)
        self.messages.append(answer)
        return str(answer.content)
