"""`cairn batch RUN STEP`: what it names is what the model was given."""

import json
import re
import shutil
from pathlib import Path

import pytest

from cairn.config.load import load
from cairn.config.schema import PretrainConfig
from cairn.data.prepare import open_prepared, prepare
from cairn.train.folder import RunFolder
from cairn.train.language_model import LanguageModel
from pretrain.batch import data_step, shortened
from tests.pretrain import runs
from tests.pretrain.conftest import CONFIG, SIZE, Place

LINE = re.compile(r"  tokens +(\d+)-(\d+) +(.*)  \((whole|its (\d+)-(\d+) of (\d+))\)")


def batch(folder: RunFolder, *argv: str, code: int = 0, **options: object) -> str:
    return runs.run(folder.path, *argv, module="pretrain.batch", folder=folder.path, code=code, **options).text


def make(here: Path, objective: str) -> LanguageModel:
    """Documents that say which line they are on; several fit into a sequence."""
    source = here / "corpus.jsonl"
    source.write_text("".join(json.dumps({"text": f"<{line}>" * (line % 9 + 3)}) + "\n" for line in range(1, 300)))
    path = here / "config.yaml"
    model = f"{{name: {'gpt' if objective == 'causal' else 'bert'}, {SIZE}}}"
    text = CONFIG.format(here=here, model=model, objective=f"{{name: {objective}}}", steps=4)
    path.write_text(text.replace(f"{here}/corpus,", f"{source},"))
    config = load(PretrainConfig, path)
    return LanguageModel(config, open_prepared(prepare(config.data, config.tokenizer)))


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_a_sample_is_made_of_the_documents_it_names(tmp_path: Path, objective: str) -> None:
    task = make(tmp_path, objective)
    lines = (tmp_path / "corpus.jsonl").read_text().splitlines()
    several = 0
    for k in range(200):
        item = task.training_samples.item(k)
        if objective == "causal":
            ids = [*item["input_ids"].tolist(), int(item["labels"][-1])]
        else:
            ids = [x if y == -100 else y for x, y in zip(item["input_ids"], item["labels"], strict=True)]
        covered = set()
        for where, piece, tokens in task.documents(k):
            assert ids[piece.start : piece.stop] == tokens.tolist()
            covered |= set(range(piece.start, piece.stop))
            file, _, line = where.rpartition(":")
            assert file == str(tmp_path / "corpus.jsonl")
            document = json.loads(lines[int(line) - 1])["text"] + "\0"  # its end token
            assert piece.length == len(document)
            text = task.prepared.tokenizer.decode([i for i in tokens.tolist() if i != task.prepared.tokenizer.eos_id])
            assert text == document[piece.first : piece.first + len(tokens)].removesuffix("\0")
        if objective == "causal":
            assert covered == set(range(len(ids)))
        else:  # all but [CLS], [SEP] and padding
            special = task.prepared.tokenizer.special_ids()
            assert covered == {i for i, token in enumerate(ids) if token not in special}
        several += len(task.origin(k)) > 1
        assert len(set(task.origin(k))) == len(task.origin(k))
    assert several > 50


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_documents_of_a_step(place: Place, ranks: int) -> None:
    """Of a BERT: both segments; the same whatever the ranks."""
    name = f"batch-{ranks}"
    place.run(place.bert, name, "train.steps=2", "train.micro_batch_size=4", ranks=ranks)
    said = batch(place.folder(name), "2", "--text").splitlines()
    assert said[0].startswith(f"step 2: samples 8 to 15 of {place.here}/data/corpus-")
    assert [line for line in said if line.startswith("sample")] == [
        f"sample {k}: {place.here}/corpus" for k in range(8, 16)
    ]
    named = [match for line in said if (match := LINE.fullmatch(line))]
    assert len(named) >= 16
    for match in named:
        path, _, line = match[3].rpartition(":")
        assert (Path(path).parent, line) == (place.here / "corpus", "1")
    for match, line in zip(named, [said[said.index(match[0]) + 1] for match in named], strict=True):
        text = Path(match[3].rpartition(":")[0]).read_text()
        assert line.strip().rstrip("…")[:20] in " ".join(text.split())


def test_a_step_that_is_still_to_come(straight: RunFolder) -> None:
    said = batch(straight, "1000", "--samples", "2")
    assert "note: step 1000 is past the end of this run (train.steps 14)" in said
    assert "step 1000: samples 7992 to 7999 of" in said
    assert len(re.findall("^sample", said, re.M)) == 2
    assert "... and 6 samples more" in said


def test_samples_that_a_roll_back_passed_over(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert data_step(folder, 3, 10) == (2, "step 3 is not done yet (metrics.jsonl ends at step 0): what it will be")
    rows = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0}, {"step": 2, "valid/loss": 1.0}]
    rows += [{"step": 3, "loss": 1.0, "data_step": 7}, {"step": 4, "loss": 1.0, "data_step": 8}]
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [data_step(folder, step, 10)[0] for step in (1, 2, 3, 4, 5, 6)] == [0, 1, 7, 8, 9, 10]
    assert [bool(data_step(folder, step, 10)[1]) for step in (1, 2, 3, 4, 5, 6)] == [False] * 4 + [True] * 2


def test_after_the_sources_have_gone_and_the_corpus_has_moved(place: Place, straight: RunFolder) -> None:
    expected = batch(straight, "5")
    run = runs.copied(straight, "moved")
    (place.here / "elsewhere").mkdir()
    prepared = place.here / "data"
    for folder in prepared.glob("corpus-*"):
        shutil.copytree(folder, place.here / "elsewhere" / folder.name)
    gone = (f"data.dir={place.here}/elsewhere", f"data.source={place.here}/gone")
    assert batch(run, "5", *gone) == expected.replace(str(prepared), f"{place.here}/elsewhere").replace(
        f"sample: {place.here}/corpus", f"sample: {place.here}/gone"
    )
    shutil.rmtree(place.here / "elsewhere")
    said = batch(run, "5", *gone, code=2)
    assert "the corpus it is trained on is not in data.dir" in said
    shutil.rmtree(run.checkpoints)
    assert batch(run, "5") == expected
    assert "the corpus it is trained on is not in data.dir" in batch(run, "5", "data.dir=x", code=2)


@pytest.mark.parametrize(("argv", "message"), [(["0"], "positive integer"), (["x"], "positive"), ([], "required")])
def test_what_is_no_step(straight: RunFolder, argv: list[str], message: str) -> None:
    assert message in batch(straight, *argv, code=2)


def test_no_run(tmp_path: Path) -> None:
    assert "no config.yaml: give a run folder" in batch(RunFolder(tmp_path), "1", code=2)


def test_a_text_as_a_line() -> None:
    assert shortened("a\n  b\x1b[31m\tc") == "a b [31m c"
    assert len(shortened("word " * 100)) == 72
