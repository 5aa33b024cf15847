"""The head of a fine-tuned task as a class of `transformers`."""

from dataclasses import replace
from types import ModuleType
from typing import Any

from cairn.config.finetune import TaskSection
from cairn.data.tokenizer import Tokenizer
from cairn.errors import UserError
from cairn.hub import llama
from cairn.hub.convert import Entry, linear
from cairn.models.headed import Headed

KINDS = {"tag": "TokenClassification", "answer": "QuestionAnswering", "choice": "MultipleChoice"}
"""Of the other tasks: SequenceClassification."""
PROBLEMS = {
    "classify": "single_label_classification",
    "regress": "regression",
    "multilabel": "multi_label_classification",
}


def head_counterpart(family: ModuleType, model: Headed, task: TaskSection) -> tuple[str, dict[str, Any], list[Entry]]:
    """Architecture of transformers, arguments of its config beside the body's, and the table of names.

    Raises UserError for a task that transformers has no head for.
    """
    if model.kind == "mean":
        raise UserError("transformers has no head on the mean over tokens: task.pooling mean cannot be exported")
    kind = KINDS.get(task.name, "SequenceClassification")
    architecture = f"{family.NAME}For{kind}"
    if task.name == "choice" and family.NAME != "Bert":
        raise UserError(f"transformers has no {architecture}: task.name choice of model.name gpt cannot be exported")
    arguments: dict[str, Any] = {"num_labels": model.head.out_features, "classifier_dropout": model.section.dropout}
    if labels := getattr(task, "labels", []):
        arguments |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    if task.name in PROBLEMS:
        arguments["problem_type"] = PROBLEMS[task.name]
    # `head` of the family's table is that of the language model.
    names = {name for name, _ in model.named_parameters() if not name.startswith("head.")}
    body = [entry for entry in family.table(model.section) if entry.ours in names]
    if architecture == "LlamaForQuestionAnswering":  # which alone calls its body so
        body = [replace(entry, theirs=tuple(map(_as_transformer, entry.theirs))) for entry in body]
    head = "qa_outputs" if task.name == "answer" else family.HEADS[model.kind]
    return architecture, arguments, [*body, *linear("head", head, bias=model.head.bias is not None)]


def padding_id(tokenizer: Tokenizer) -> int:
    """The id that transformers may take for padding: a text's output is read from its last token that is not that, so
    where the tokenizer pads with the end of text, or not at all, it is a new one."""
    known = tokenizer.pad_id
    return tokenizer.vocab_size if known is None or known == tokenizer.eos_id else known


def _as_transformer(name: str) -> str:
    return f"transformer.{name.removeprefix(llama.PREFIX)}"
