"""From a config to its task."""

from collections.abc import Iterator

from cairn.cluster import Cluster
from cairn.config.schema import FinetuneConfig
from cairn.data.tokenizer import BytesTokenizer, Tokenizer
from cairn.errors import UserError
from finetune.answer import Answer
from finetune.choice import Choice
from finetune.instruct import Instruct
from finetune.labelled import Classify, Multilabel, Regress
from finetune.start import open_start
from finetune.tag import Tag
from finetune.task import Finetune
from finetune.translate import Translate

TASKS: dict[str, type[Finetune]] = {
    "classify": Classify,
    "regress": Regress,
    "multilabel": Multilabel,
    "tag": Tag,
    "answer": Answer,
    "choice": Choice,
    "translate": Translate,
    "instruct": Instruct,
}
"""By task.name."""


def make_task(config: FinetuneConfig, cluster: Cluster) -> Finetune:
    """COLLECTIVE: the task of a config, its base opened and its examples read; `task.config` has what they settle.

    Raises UserError as these do.
    """
    kind = TASKS[config.task.name]

    def texts() -> Iterator[str]:
        reader = kind(config, BytesTokenizer())
        return (text for row in reader.rows(config.data.train) for text in reader.texts(row))

    start = open_start(config, texts, cluster)
    task = build_task(config.model_copy(update={"model": start.section}), start.tokenizer)
    cluster.on_all(lambda: task.load(start))
    return task


def build_task(config: FinetuneConfig, tokenizer: Tokenizer) -> Finetune:
    """The task alone, without examples: as for predicting. Raises UserError for a tokenizer that lacks a token, and
    for a task that has no examples."""
    if config.task.name not in TASKS:
        raise UserError(
            f"task.name {config.task.name} predicts nothing of a row: cairn generate or cairn eval use its runs"
        )
    return TASKS[config.task.name](config, tokenizer)
