"""Run folders of small untrained models, and small tasks."""

import json
import random
from pathlib import Path

import torch

from cairn.config.data import BytesSection, CausalSection, MaskedSection
from cairn.config.model import BERTSection, GPTSection
from cairn.config.schema import PretrainConfig
from cairn.data.tokenizer import BytesTokenizer
from cairn.models.build import build_model
from cairn.train.checkpoint import CheckpointStore
from cairn.train.folder import RunFolder

SMALL = {"n_layer": 2, "n_head": 4, "d_model": 32, "max_seq_len": 48, "init_std": 0.2}
TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}, {metric: word_perplexity}]
""",
    "last": """
output_type: loglikelihood
doc_to_text: "{{query}}"
doc_to_target: " {{choices[0]}}"
metric_list: [{metric: perplexity}, {metric: acc}]
""",
    "write": """
output_type: generate_until
doc_to_text: "{{query}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: [STOP], max_gen_toks: 20, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


def make_run(path: Path, section: GPTSection | BERTSection) -> Path:
    """A run folder of an untrained model on bytes, at step 7; it writes ASCII: other tokens have a logit of 0."""
    bert = isinstance(section, BERTSection)
    folder, tokenizer = RunFolder(path), BytesTokenizer()
    objective = MaskedSection() if bert else CausalSection()
    folder.create(PretrainConfig(model=section, tokenizer=BytesSection(), objective=objective))
    tokenizer.save(folder.tokenizer)
    torch.manual_seed(0)
    model = build_model(section, tokenizer.vocab_size)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(torch.randn_like(p) * 0.1)
            if name == "embed.token.weight":
                written = tokenizer.encode("".join(map(chr, range(32, 127))))
                p[[i for i in range(len(p)) if i not in written]] = 0
    tensors = ((f"model/weight/{name}", p.detach()) for name, p in model.named_parameters())
    CheckpointStore(folder.checkpoints).save(7, tensors, {})
    return path


def make_task(folder: Path, kind: str, rows: list[dict[str, object]], stop: str = "e") -> Path:
    """A task file and its data beside it."""
    folder.mkdir(exist_ok=True)
    (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / f"{kind}.yaml"
    head = (
        f"task: {kind}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {kind}.jsonl}}}}\ntest_split: test\n"
    )
    path.write_text(head + TASKS[kind].replace("STOP", json.dumps(stop)))
    return path


def make_rows(n: int) -> list[dict[str, object]]:
    """Random words: some queries are longer than a small model sees, some texts are many times so, one query is é."""
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join("".join(draw.choices("abcdefgh é", k=draw.randint(1, 7))) for _ in range(count)).strip() or "a"

    return [
        {
            "query": "é" if i == 3 else words(1 + i),
            "choices": [words(1 + k % 2) for k in range(4)],
            "gold": draw.randrange(4),
            "text": words(1 + 4 * i),
        }
        for i in range(n)
    ]
