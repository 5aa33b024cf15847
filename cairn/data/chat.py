"""Conversations as ids: a tokenizer's own chat template, as `transformers` renders it, or a plain one."""

import re
from collections.abc import Sequence
from itertools import chain
from typing import Any

from cairn.data.tokenizer import Tokenizer
from cairn.errors import UserError

Messages = Sequence[dict[str, str]]
"""{"role": "system", "user" or "assistant", "content": text} each."""

PLAIN = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'] | capitalize + '\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant\\n' }}{% endif %}"
)
"""The template of tokenizers that have none: a heading a turn, and end of text after what the assistant says."""

QUOTE = "\ufdd0"
"""No character: put between those of a special token's name where a message has it."""


class Chat:
    """A tokenizer and the template that it is used with, its own or PLAIN.

    Raises UserError where the template is none, or nothing in it ends an answer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.template = tokenizer, tokenizer.chat_template or PLAIN
        self.special = tokenizer.special_tokens()
        self._names_in = re.compile("|".join(map(re.escape, sorted(self.special, key=len, reverse=True))) or "(?!)")
        names = {i: name for name, i in self.special.items()}
        ids = {kind: getattr(tokenizer, f"{kind}_id") for kind in ("bos", "eos", "pad", "unk")}
        self._variables = {f"{kind}_token": names[i] for kind, i in ids.items() if i in names}
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        answer = self.turns(probe)[-1][0]
        ends = [i for i in answer if i in names]
        if not ends:
            raise UserError(
                "chat template: no special token ends what the assistant says, so nothing would end an answer: "
                "give the tokenizer an end-of-text token, and write it there as {{ eos_token }}"
            )
        self.end_id = ends[-1]
        """The last token of an answer."""

    def prompt(self, messages: Messages) -> list[int]:
        """Ids up to where the assistant is to answer. Raises UserError where the template refuses the messages."""
        return self._encode(self._render(messages, answer=True))

    def turns(self, messages: Messages) -> list[tuple[list[int], bool]]:
        """Ids of a conversation in parts, and of each whether the assistant says it, up to the token that ends it.

        Raises UserError where the template refuses the messages, or writes a turn otherwise once there are more.
        """
        parts: list[tuple[list[int], bool]] = []
        done = ""
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = self._render(messages[:number], answer=True), self._render(messages[: number + 1])
            if not before.startswith(done) or not after.startswith(before):
                raise UserError(
                    "chat template: it writes earlier turns otherwise once there are later ones, so that no turn can "
                    "be told apart: give each answer a row of its own"
                )
            said = after[len(before) :]
            if said.rstrip().endswith(tuple(self.special)):
                said = said.rstrip()  # the line end after an answer's last token is read, not written
            parts += [(self._encode(before[len(done) :]), False), (self._encode(said), True)]
            done = before + said
        return parts

    def _render(self, messages: Messages, answer: bool = False) -> str:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        # What a message says is text, though it be the name of a special token.
        quoted = [
            m | {"content": self._names_in.sub(lambda found: QUOTE.join(found[0]), m["content"])} for m in messages
        ]
        try:
            (text,), _ = render_jinja_template(
                [quoted], chat_template=self.template, add_generation_prompt=answer, **self._variables
            )
        except TemplateError as error:
            raise UserError(f"chat template: {error}") from error
        return str(text)

    def _encode(self, text: str) -> list[int]:
        """Ids of what a template wrote: names of special tokens in it are these."""
        names = self._names_in.findall(text)
        ids = self.tokenizer.encode_batch([piece.replace(QUOTE, "") for piece in self._names_in.split(text)])
        return [
            *ids[0],
            *chain.from_iterable([self.special[name], *rest] for name, rest in zip(names, ids[1:], strict=True)),
        ]


class UserTokenizer:
    """A tokenizer that takes a text for what a user says: its ids are the whole prompt, and what ends an answer ends
    text. In all else it is the tokenizer of the chat."""

    def __init__(self, chat: Chat, system: str = "") -> None:
        self.chat, self.eos_id = chat, chat.end_id
        self.before = [{"role": "system", "content": system}] if system else []

    def encode(self, text: str) -> list[int]:
        """Ids of the prompt."""
        return self.chat.prompt([*self.before, {"role": "user", "content": text}])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.chat.tokenizer, name)
