"""Instruction tuning: transformers' ids, masks and loss; answers learned and written; mistakes told."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from cairn.cluster import Cluster
from cairn.data.batches import IGNORE
from cairn.data.chat import Chat
from cairn.data.tokenizer import BytesTokenizer, load_tokenizer
from cairn.errors import UserError
from cairn.hub.tokenizer import export_tokenizer
from cairn.train.checkpoint import folder_of
from cairn.train.outcome import Outcome
from cairn.train.run import load_model
from finetune.build import build_task, make_task
from finetune.instruct import Instruct
from finetune.run import outputs_of
from tests.finetune.conftest import config_of

Run = Callable[..., Outcome]
SCRATCH = [
    "tokenizer.name=bytes",
    "model={name: gpt, n_layer: 2, n_head: 2, d_model: 64, max_seq_len: 64, position: rope}",
    "task.name=instruct",
    "run.name=i",
]
QUICK = ["train.global_batch_size=16", "train.micro_batch_size=16", "optim={name: muon, adam_lr: 5e-3}"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TALK = [
    [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "Hi!"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "two\nlines"},
        {"role": "assistant", "content": "yes: two"},
        {"role": "user", "content": "and now?"},
        {"role": "assistant", "content": "still"},
    ],
    [{"role": "user", "content": "a longer question, of more words"}, {"role": "assistant", "content": "no"}],
]


def questions(path: Path, n: int, seed: int = 0) -> Path:
    """Of three letters, which is the last one, twice?"""
    rng = random.Random(seed)
    rows = [rng.sample("abcdef", 3) for _ in range(n)]
    path.write_text("".join(json.dumps({"prompt": "".join(row), "response": row[2] * 2}) + "\n" for row in rows))
    return path


def data(folder: Path, n: int = 200) -> list[str]:
    train, valid = questions(folder / "train.jsonl", n), questions(folder / "valid.jsonl", 20, seed=1)
    return [*SCRATCH, *QUICK, f"data.train={train}", f"data.valid={valid}"]


def make(folder: Path, one: Cluster, *keys: str) -> Instruct:
    task = make_task(config_of(folder, *keys), one)
    assert isinstance(task, Instruct)
    return task


def gpt2_folder(folder: Path) -> Any:
    """A GPT-2 with a byte-level tokenizer and a ChatML template."""
    vocab = {piece: i for i, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend.add_special_tokens([AddedToken(name, special=True) for name in names])
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", chat_template=CHATML, clean_up_tokenization_spaces=False
    )
    theirs.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=128, vocab_size=len(theirs))
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(folder)
    return model


def test_ids_masks_and_packed_loss_are_those_of_transformers(tmp_path: Path, one: Cluster) -> None:
    model = gpt2_folder(tmp_path / "gpt2")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "gpt2", local_files_only=True)
    table = tmp_path / "talk.jsonl"
    table.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in TALK))
    keys = [f"data.train={table}", f"data.valid={table}", "task.name=instruct", "task.messages=messages"]
    task = make(tmp_path, one, f"base.path={tmp_path / 'gpt2'}", "base.dropout=0", *keys)
    total, count = 0.0, 0
    for talk, example in zip(TALK, task.examples["valid"], strict=True):
        found = theirs.apply_chat_template(
            talk, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=False
        )
        ids, mask = torch.tensor(found["input_ids"]), torch.tensor(found["assistant_masks"]).bool()
        labels = ids.masked_fill(~mask, IGNORE)
        size = len(example.item["labels"])
        assert example.item["input_ids"].tolist() == ids[:size].tolist()
        assert example.item["labels"].tolist() == labels[1 : size + 1].tolist()
        assert (labels[size + 1 :] == IGNORE).all()  # a line end after the last answer
        with torch.no_grad():
            total += float(model(input_ids=ids[None], labels=labels[None]).loss) * int(mask.sum())
        count += int(mask.sum())
    samples = task.samples("valid")
    batch = samples.collate([samples.item(k) for k in range(len(TALK))])  # type: ignore[attr-defined]
    network = task.models()["model"]
    assert len(batch["input_ids"]) < len(TALK)
    assert task.weights(batch) == {"loss": count}
    assert float(task.loss_sums(network, batch)["loss"]) == pytest.approx(total, rel=1e-5)
    logits = task.forward(network, batch)
    assert float(task.sums(logits, batch)["loss"]) == pytest.approx(total, rel=1e-5)
    alone = [task.split(task.forward(network, b), b)[0] for k in range(3) for b in [samples.collate([samples.item(k)])]]
    np.testing.assert_array_equal(task.split(logits, batch), alone)
    assert sum(out[1] for out in alone) == count
    prompt = theirs.apply_chat_template(TALK[0][:1], tokenize=True, add_generation_prompt=True, return_dict=False)
    assert task.chat.prompt(TALK[0][:1]) == prompt
    assert task.tokenizer.special_tokens()["<|im_end|>"] == task.chat.end_id
    task.tokenizer.save(tmp_path / "kept")
    assert load_tokenizer(tmp_path / "kept").chat_template == CHATML


def test_the_plain_template_and_what_only_looks_like_a_token() -> None:
    tokenizer = BytesTokenizer()
    chat = Chat(tokenizer)
    talk = [{"role": "user", "content": "is </s> text?"}, {"role": "assistant", "content": "<s> is"}]
    (read, no), (said, yes) = chat.turns(talk)
    assert (no, yes) == (False, True)
    assert tokenizer.decode(read) == "### User\nis </s> text?\n\n### Assistant\n"
    assert said == [*tokenizer.encode("<s> is"), tokenizer.eos_id]
    assert chat.prompt(talk[:1]) == read
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match="no special token ends what the assistant says"):
        Chat(tokenizer)
    tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(UserError, match="chat template: no system here"):
        Chat(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{% if loop.last or m.role != 'assistant' %}{{ m.content }}</s>"
    tokenizer.chat_template += "{% endif %}{% endfor %}"
    with pytest.raises(UserError, match="writes earlier turns otherwise"):
        Chat(tokenizer).turns([*talk, *talk])


def test_an_exported_tokenizer_writes_conversations_as_ours(tmp_path: Path) -> None:
    tokenizer = BytesTokenizer()
    chat = Chat(tokenizer)
    tokenizer.chat_template = chat.template
    assert export_tokenizer(tokenizer, tmp_path, tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    ids = theirs.apply_chat_template(TALK[1], tokenize=True, return_dict=False)
    assert ids[:-2] == [i for part, _ in chat.turns(TALK[1]) for i in part]
    assert tokenizer.decode(ids[-2:]) == "\n\n"


def test_it_learns_to_answer_and_generate_answers(
    tmp_path: Path, finetune: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = finetune(*data(tmp_path), "train.steps=120", "train.evals=1", "task.system=Say it twice.")
    assert outcome.metrics["valid/accuracy"] > 0.9
    run = load_model(outcome.folder.path, torch.device("cpu"))
    task = build_task(run.config, run.tokenizer)
    rows = list(task.rows(str(tmp_path / "valid.jsonl")))
    assert not task.labelled(rows)
    examples = task.encode(rows, labelled=False)
    for batch_size in (20, 3):
        found = [one["prediction"] for one in task.predict(examples, outputs_of(task, run.model, examples, batch_size))]
        right = sum(text == row.values["response"] for text, row in zip(found, rows, strict=True))
        assert right >= 16
    from cairn.decode.__main__ import main

    prompt = rows[0].values["prompt"]
    capsys.readouterr()
    for more in ([], ["--beams", "1"]):
        command = ["generate", str(outcome.folder.path), "--chat", "--prompt", prompt, "--max-new-tokens", "8", *more]
        monkeypatch.setattr("sys.argv", [*command, *([] if more else ["--greedy"])])
        main()
        assert capsys.readouterr().out == f"{found[0]}\n"


def test_a_killed_run_goes_on_to_the_bit(tmp_path: Path, finetune: Run) -> None:
    keys = [*data(tmp_path, 60), "train.steps=4", "checkpoint.every=2", "model.dropout=0.1"]
    outcome = finetune(*keys)
    straight = [row["loss"] for row in outcome.folder.rows() if "loss" in row]
    folder_of(outcome.folder.checkpoints, 4).rename(tmp_path / "gone")
    again = finetune(*keys)
    assert (again.first, again.step) == (2, 4)
    assert [row["loss"] for row in again.folder.rows() if "loss" in row] == straight


def test_mistakes_are_told(tmp_path: Path, one: Cluster, bases: dict[str, Path]) -> None:
    keys = data(tmp_path, 20)
    (tmp_path / "empty.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a", "response": " "}\n')
    with pytest.raises(UserError, match=r"empty\.jsonl: line 2: column 'response' is empty"):
        make(tmp_path, one, *keys, f"data.train={tmp_path / 'empty.jsonl'}")
    for messages, told in (
        ("[]", "messages is no list of messages"),
        ('[{"role": "user"}]', "message 1 of messages needs a role and a content"),
        ('[{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]', "message 2 of messages is empty"),
        ('[{"role": "user", "content": "a"}]', "no turn of the assistant"),
    ):
        (tmp_path / "talk.jsonl").write_text(f'{{"messages": {messages}}}\n')
        with pytest.raises(UserError, match=rf"talk\.jsonl: line 1: .*{told}"):
            make(tmp_path, one, *keys, f"data.train={tmp_path / 'talk.jsonl'}", "task.messages=messages")
    with pytest.raises(UserError, match="instruct needs a model of kind gpt, and this is bert"):
        make(tmp_path, one, f"base.path={bases['bert']}", "task.name=instruct", *keys[-2:])


def test_answers_beyond_max_len_are_left_out_and_told(tmp_path: Path, one: Cluster) -> None:
    table = tmp_path / "long.jsonl"
    rows = [
        {"prompt": "a", "response": "b" * 60},
        {"prompt": "a" * 60, "response": "b"},
        {"prompt": "a", "response": "b"},
    ]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = make(tmp_path, one, *SCRATCH, f"data.train={table}", f"data.valid={table}", "data.max_len=48")
    assert [len(example.item["labels"]) for example in task.examples["train"]] == [47, 27]
    assert any("1 of 3 rows have no answer within data.max_len 48" in note and "line 2" in note for note in task.notes)
