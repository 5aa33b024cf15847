"""Translation: T5's loss, pairs packed as alone, a language learned, judged the same on any number of ranks."""

import gzip
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from cairn.cluster import Cluster
from cairn.config.train import AdamWSection, EngineSection
from cairn.data.batches import IGNORE, Loader
from cairn.data.tokenizer import BytesTokenizer, load_tokenizer
from cairn.decode.translate import encode_source
from cairn.errors import UserError
from cairn.train.checkpoint import folder_of
from cairn.train.engine import Engine
from cairn.train.outcome import Outcome
from cairn.train.run import load_model
from finetune.build import build_task, make_task
from finetune.run import outputs_of
from finetune.translate import Translate
from tests.finetune.conftest import config_of
from tests.train.dist import run_distributed

Run = Callable[..., Outcome]
WORDS = {"ka": "ma", "ke": "me", "ki": "mi", "ko": "mo", "ku": "mu", "kö": "my", "kü": "mw"}
"""Each is one piece of a small tokenizer."""
SCRATCH = [
    "tokenizer={name: sentencepiece, vocab_size: 300}",
    "model={name: seq2seq, n_layer: 2, n_decoder_layer: 1, n_head: 2, d_model: 64, d_ff: 128, max_seq_len: 48, "
    "dropout: 0.0}",
    "task.name=translate",
    "run.name=t",
]
QUICK = ["train.global_batch_size=32", "train.micro_batch_size=32", "optim={name: muon, adam_lr: 5e-3}"]


def pairs(n: int, seed: int = 0) -> list[tuple[str, str]]:
    """Words, and their translations in reverse."""
    rng = random.Random(seed)
    texts = [rng.sample(list(WORDS), rng.randint(3, 6)) for _ in range(n)]
    return [(" ".join(words), " ".join(WORDS[word] for word in reversed(words))) for words in texts]


def lines(folder: Path, name: str, found: list[tuple[str, str]]) -> tuple[Path, Path]:
    """Two files, line by line; the targets compressed."""
    source, target = folder / f"{name}.de", folder / f"{name}.en.gz"
    source.write_text("".join(f"{a}\n" for a, _ in found), encoding="utf-8")
    target.write_bytes(gzip.compress("".join(f"{b}\n" for _, b in found).encode()))
    return source, target


def data(folder: Path, n: int = 400) -> list[str]:
    train, valid = lines(folder, "train", pairs(n)), lines(folder, "valid", pairs(24, seed=1))
    keys = [f"data.train={train[0]}", f"task.target_train={train[1]}"]
    return [*SCRATCH, *QUICK, *keys, f"data.valid={valid[0]}", f"task.target_valid={valid[1]}"]


def make(folder: Path, one: Cluster, *keys: str) -> Translate:
    task = make_task(config_of(folder, *keys), one)
    assert isinstance(task, Translate)
    return task


def t5_folder(folder: Path) -> transformers.T5ForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 48, "num_layers": 2, "vocab_size": 263}
    start = {"decoder_start_token_id": 0, "pad_token_id": 0}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **start)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(folder)
    BytesTokenizer().save(folder / "tokenizer")
    return model


def test_packed_pairs_have_the_loss_that_t5_gives_them_alone(tmp_path: Path, one: Cluster) -> None:
    theirs = t5_folder(tmp_path / "t5")
    found = pairs(12)
    table = tmp_path / "pairs.tsv"
    table.write_text("".join(f"{a}\t{b}\n" for a, b in [("de", "en"), *found]), encoding="utf-8")
    keys = [f"base.path={tmp_path / 't5'}", f"data.train={table}", f"data.valid={table}", "task.name=translate"]
    task = make(tmp_path, one, *keys, "task.source=de", "task.target=en", "base.dropout=0")
    model, samples = task.models()["model"], task.samples("valid")
    batch = samples.collate([samples.item(k) for k in range(12)])  # type: ignore[attr-defined]
    assert batch["source_ids"].shape[0] < 12
    tokenizer, expected, count = BytesTokenizer(), 0.0, 0
    for source, target in found:
        labels = torch.tensor([[*tokenizer.encode(target), tokenizer.eos_id]])
        ids = torch.tensor([encode_source(tokenizer, source)])
        with torch.no_grad():
            expected += float(theirs(input_ids=ids, labels=labels).loss) * labels.numel()
        count += labels.numel()
    assert task.weights(batch) == {"loss": count}
    assert float(task.loss_sums(model, batch)["loss"]) == pytest.approx(expected, rel=1e-5)


def test_it_learns_to_turn_a_language_around_and_predicts_as_it_was_judged(tmp_path: Path, finetune: Run) -> None:
    keys = data(tmp_path)
    outcome = finetune(*keys, "train.steps=120", "task.eval_texts=24")
    assert outcome.metrics["valid/bleu"] > 50
    assert outcome.best is not None
    assert outcome.best.value == outcome.metrics["valid/bleu"]
    run = load_model(outcome.folder.path, torch.device("cpu"))
    task = build_task(run.config, run.tokenizer)
    rows = list(task.rows(str(tmp_path / "valid.de")))
    assert task.labelled(rows)
    examples = task.encode(rows)
    for batch_size in (24, 5):
        outputs = outputs_of(task, run.model, examples, batch_size)
        measured = {f"valid/{name}": value for name, value in task.measure(examples, outputs).items()}
        assert measured == {name: outcome.metrics[name] for name in ("valid/bleu", "valid/chrf")}
    (tmp_path / "new.de").write_text("ka ki ko\n")
    rows = list(task.rows(str(tmp_path / "new.de")))
    assert not task.labelled(rows)
    examples = task.encode(rows, labelled=False)
    assert (examples[0].item["labels"] == IGNORE).all()
    (found,) = task.predict(examples, outputs_of(task, run.model, examples, 8))
    assert set(found["prediction"].split()) <= set(WORDS.values())


def test_a_killed_run_goes_on_to_the_bit(tmp_path: Path, finetune: Run) -> None:
    keys = [*data(tmp_path, 60), "train.steps=4", "checkpoint.every=2", "model.dropout=0.1", "task.eval_texts=0"]
    outcome = finetune(*keys)
    assert outcome.folder.evaluations()[-1].keys() >= {"valid/loss"}
    straight = [row["loss"] for row in outcome.folder.rows() if "loss" in row]
    folder_of(outcome.folder.checkpoints, 4).rename(tmp_path / "gone")
    again = finetune(*keys)
    assert (again.first, again.step) == (2, 4)
    assert [row["loss"] for row in again.folder.rows() if "loss" in row] == straight


def judged(rank: int, folder: Path, world: int, stage: int) -> dict[str, float]:
    cluster = Cluster(rank, world, rank, world)
    task = make_task(config_of(folder / str(rank), *data(folder / str(rank), 60), "task.eval_texts=11"), cluster)
    model = task.models()["model"]
    model.load_state_dict(torch.load(folder / "weights", weights_only=True))
    engine = Engine(model, EngineSection(zero_stage=stage, precision="fp32"), AdamWSection(), 4, cluster)
    return task.evaluate({"model": engine}, Loader(task.samples("valid"), 4 * world, 4, rank, world).evaluation(4))


@pytest.mark.slow
def test_two_ranks_share_the_translating(tmp_path: Path, one: Cluster) -> None:
    for name in ("0", "1"):
        (tmp_path / name).mkdir()
    task = make(tmp_path / "0", one, *data(tmp_path / "0", 60))
    model, samples = task.models()["model"], task.samples("train")
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for step in range(40):  # until it writes something
        batch = samples.collate([samples.item(step * 16 + k) for k in range(16)])  # type: ignore[attr-defined]
        (task.loss_sums(model, batch)["loss"] / task.weights(batch)["loss"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save(model.state_dict(), tmp_path / "weights")
    (alone,) = run_distributed(judged, 1, tmp_path, 1, 1)
    assert alone["chrf"] > 0
    for stage in (1, 3):
        first, second = run_distributed(judged, 2, tmp_path, 2, stage)
        assert first == second == pytest.approx(alone, rel=1e-5)


def test_long_sides_are_cut_and_a_row_is_told_once(tmp_path: Path, one: Cluster) -> None:
    found = [("ka " * 40, "ma " * 40), *pairs(20)]
    source, target = lines(tmp_path, "long", found)
    keys = [*SCRATCH, f"data.train={source}", f"task.target_train={target}", "data.max_len=10", "data.valid="]
    task = make(tmp_path, one, *keys)
    longest = max((e for split in task.examples.values() for e in split), key=lambda e: len(e.row["source"]))
    eos = task.tokenizer.eos_id
    assert len(longest.item["source_ids"]) == len(longest.item["labels"]) == len(longest.item["input_ids"]) == 10
    assert longest.item["source_ids"][-1] == longest.item["labels"][-1] == eos
    assert longest.item["input_ids"][0] == task.tokenizer.pad_id
    assert (longest.item["input_ids"][1:] == longest.item["labels"][:-1]).all()
    assert any("1 of" in note and "line 1" in note for note in task.notes)
    with pytest.raises(UserError, match=r"long\.de: line 1: \d+ tokens, and 9 fit"):
        make(tmp_path, one, *keys, "data.too_long=error")


def test_files_that_do_not_match_are_told(tmp_path: Path, one: Cluster) -> None:
    keys = data(tmp_path, 60)
    (tmp_path / "short.en").write_text("ma\n" * 59)
    with pytest.raises(UserError, match=r"train\.de has 60 lines, .*short\.en 59"):
        make(tmp_path, one, *keys, f"task.target_train={tmp_path / 'short.en'}")
    with pytest.raises(UserError, match=r"task\.target_valid: .*valid\.de holds sources alone"):
        make(tmp_path, one, *keys, "task.target_valid=")
    keys[1] = "model={name: gpt, n_layer: 1, n_head: 1, d_model: 8, max_seq_len: 16}"
    with pytest.raises(UserError, match="translate needs a model of kind seq2seq, and this is gpt"):
        make(tmp_path, one, *keys)


def test_the_tokenizer_knows_both_languages(tmp_path: Path, one: Cluster) -> None:
    make(tmp_path, one, *data(tmp_path))
    (folder,) = (tmp_path / "data").glob("tokenizer-*")
    tokenizer = load_tokenizer(folder)
    for text in ("ka kö", "ma my"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert len(tokenizer.encode(text)) <= 3
