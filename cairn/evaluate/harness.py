"""A run's model as lm-evaluation-harness asks it: how likely is this text after that, and what would you write on?"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm  # type: ignore[import-untyped]

from cairn.decode.generate import allowed_tokens, encode_prompt, generate
from cairn.decode.sample import Sampling
from cairn.decode.stop import cut_off
from cairn.errors import UserError
from cairn.models.build import padded_vocab
from cairn.models.headed import Headed
from cairn.train.run import LoadedRun

Scored = tuple[Any, list[int], list[int]]
"""What the harness wants back with the answer, the context's tokens and the continuation's."""


class Harness(TemplateLM):  # type: ignore[misc]  # the harness has no types that mypy reads
    """A causal model under the harness, which splits text into context and continuation itself.

    Text that has nothing before it follows the end of a document, as it did in training. What does not fit
    model.max_seq_len loses its oldest tokens; `cut` counts these requests. Raises UserError for a model that is not
    causal or has a head of labels, and for a tokenizer without a token that begins a document.
    """

    def __init__(self, run: LoadedRun, batch_size: int) -> None:
        super().__init__()
        headed = isinstance(run.model, Headed)
        if run.section.objective != "causal" or headed:
            raise UserError(
                f"a {run.section.name} model{' with a head' if headed else ''} cannot say how likely a text is, which "
                "is what tasks ask: give a run of a causal language model"
            )
        self.run = run
        self.batch_size = batch_size
        self.limit = run.model.section.max_seq_len
        self.start = encode_prompt(run.tokenizer, "")[0]
        self._device = next(run.model.parameters()).device
        self.cut = 0

    @property
    def eot_token_id(self) -> int:
        """The token that text without a context follows."""
        return self.start

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Tokens of a text; none is added."""
        return self.run.tokenizer.encode(string)

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, **_: object
    ) -> list[tuple[float, bool]]:
        """log p(continuation | context) in nats, and whether each of its tokens is the most likely one.

        Raises UserError for a continuation of no token, or of more than the model sees.
        """
        for text, _context, continuation in requests:
            if not 0 < len(continuation) <= self.limit:
                raise UserError(
                    f"an answer has {len(continuation)} tokens, and model.max_seq_len {self.limit} lets 1 to "
                    f"{self.limit} be scored: take it out of the task's data ({str(text)[-60:]!r})"
                )
        self.cut += sum(len(context) + len(continuation) > self.limit + 1 for _text, context, continuation in requests)
        longest_first = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        answers = [(0.0, False)] * len(requests)
        with tqdm(total=len(requests), desc="scoring", disable=disable_tqdm or None) as bar:
            for first in range(0, len(requests), self.batch_size):
                members = longest_first[first : first + self.batch_size]
                for i, answer in zip(members, self._score([requests[i] for i in members]), strict=True):
                    answers[i] = answer
                bar.update(len(members))
        return answers

    def _score(self, requests: Sequence[Scored]) -> list[tuple[float, bool]]:
        """One batch. Rows are filled up on the right, which no token before sees."""
        rows = [(context + continuation)[-self.limit - 1 :] for _, context, continuation in requests]
        ids = torch.zeros(len(rows), max(map(len, rows)) - 1, dtype=torch.int64)
        for row, tokens in zip(ids, rows, strict=True):
            row[: len(tokens) - 1] = torch.tensor(tokens[:-1])
        logits = self.run.model(ids.to(self._device))
        answers = []
        for tokens, scores, (_, _, continuation) in zip(rows, logits, requests, strict=True):
            target = torch.tensor(continuation, device=self._device)
            scores = scores[len(tokens) - 1 - len(target) : len(tokens) - 1].float().log_softmax(-1)
            nats = scores.gather(1, target[:, None]).sum().item()
            answers.append((nats, bool((scores.argmax(-1) == target).all())))
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of each whole text in nats: every token once, in windows of max_seq_len."""
        windows: list[Scored] = []
        owner: list[int] = []
        for k, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.start, self.limit, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owner.append(k)
        totals = [0.0] * len(requests)
        for k, (nats, _) in zip(owner, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[k] += nats
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes on, up to the first of the task's stop texts, greedily unless the task samples.

        Raises UserError for a sampling option out of range.
        """
        texts = [""] * len(requests)
        together: dict[str, list[int]] = defaultdict(list)
        options = [normalize_gen_kwargs(dict(request.args[1])) for request in requests]
        for k, option in enumerate(options):
            together[str(option)].append(k)
        for members in together.values():
            written = self._write([requests[k].args[0] for k in members], options[members[0]])
            for k, text in zip(members, written, strict=True):
                texts[k] = text
        return texts

    def _write(self, contexts: Sequence[str], options: dict[str, Any]) -> list[str]:
        """What follows each context, by the harness's options."""
        tokenizer, new = self.run.tokenizer, options["max_gen_toks"]
        whole = [encode_prompt(tokenizer, context) for context in contexts]
        # Room for what is written; where that alone is more than the model sees, half of it, as further on.
        kept = self.limit - new if new < self.limit else max(1, self.limit // 2)
        prompts = [tokens[-kept:] for tokens in whole]
        self.cut += sum(len(tokens) > kept for tokens in whole)
        begin = [len(tokenizer.decode(prompt)) for prompt in prompts]
        stops = [stop for stop in options["until"] if stop]

        def text(i: int, tokens: Sequence[int]) -> tuple[str, bool]:
            # Decoded with the prompt, since some tokenizers join words by what stands left of them.
            return cut_off(tokenizer.decode([*prompts[i], *tokens])[begin[i] :], stops)

        written = generate(
            self.run.model,
            prompts,
            new,
            Sampling(
                options.get("temperature", 1.0) if options["do_sample"] else 0.0,
                options.get("top_k") or None,  # 0 means all, as in transformers
                options.get("top_p"),
            ),
            eos_id=tokenizer.eos_id,
            allowed=allowed_tokens(tokenizer, padded_vocab(self.run.section, tokenizer.vocab_size)).to(self._device),
            batch_size=self.batch_size,
            ends=lambda i, tokens: text(i, tokens)[1],
        )
        return [text(i, tokens)[0] for i, tokens in enumerate(written)]
