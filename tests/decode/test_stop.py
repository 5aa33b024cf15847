"""Stop strings: found wherever tokens cut them, never shown, not even for a moment."""

import pytest
import torch

from cairn.config.schema import PretrainConfig
from cairn.data.tokenizer import BytesTokenizer
from cairn.decode.generate import stream_text
from cairn.decode.sample import Sampling, generators
from cairn.decode.stop import cut_off, settled
from cairn.decode.texts import Task, write_texts
from cairn.train.run import LoadedRun
from tests.decode.models import tiny_gpt


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one two", ["two"], ("one ", True)),
        ("one two", ["tw", "ne"], ("o", True)),
        ("one two", ["three"], ("one two", False)),
        ("one two", [], ("one two", False)),
    ],
)
def test_the_first_stop_cuts(text: str, stops: list[str], expected: tuple[str, bool]) -> None:
    assert cut_off(text, stops) == expected


@pytest.mark.parametrize(
    ("text", "stops", "held"),
    [("abc", ["cd"], "c"), ("abab", ["abac"], "ab"), ("abc", ["x"], ""), ("abc", [], ""), ("\n", ["\n\n"], "\n")],
)
def test_what_may_become_one_is_held_back(text: str, stops: list[str], held: str) -> None:
    assert text[settled(text, stops) :] == held


def writes(monkeypatch: pytest.MonkeyPatch, said: str, stops: list[str]) -> list[str]:
    """The pieces of a stream whose tokens are the bytes of `said`."""
    tokenizer = BytesTokenizer()
    model = tiny_gpt(vocab_size=tokenizer.vocab_size)
    run = LoadedRun(PretrainConfig(model=model.section), model.section, model, tokenizer, step=1)
    tokens = iter([torch.tensor([i]) for i in [*tokenizer.encode(said), tokenizer.eos_id]])
    monkeypatch.setattr("cairn.decode.generate.stream", lambda *_: tokens)
    (row,) = generators(0, 1)
    return [piece for piece in stream_text(run, "é <", 999, Sampling(0.0), row, stops) if piece]


@pytest.mark.parametrize(
    ("said", "stops", "pieces"),
    [
        ("ab<end>c", ["<end>"], ["a", "b"]),
        ("a<en<end>", ["<end>"], ["a", "<en"]),
        ("a<e", ["<end>"], ["a", "<e"]),
        ("añ!", ["ñ"], ["a"]),
        ("end>x", ["<end>"], list("end>x")),  # its beginning is the prompt's
        ("ab", ["ab", "b"], []),
    ],
)
def test_streaming_shows_no_part_of_one(
    monkeypatch: pytest.MonkeyPatch, said: str, stops: list[str], pieces: list[str]
) -> None:
    assert writes(monkeypatch, said, stops) == pieces


def test_batches_and_beams_end_there_as_streams_do() -> None:
    from cairn.decode.beam import Beams

    tokenizer = BytesTokenizer()
    model = tiny_gpt(vocab_size=tokenizer.vocab_size, max_seq_len=256)
    run = LoadedRun(PretrainConfig(model=model.section), model.section, model, tokenizer, step=1)
    prompts, how = ["some", "a longer prompt", "x"], Sampling(0.0)
    free = write_texts(run, prompts, Task(how, 40))
    stop = free[1][0][7:9]
    stopped = write_texts(run, prompts, Task(how, 40, stops=[stop]))
    assert stopped == [[cut_off(text, [stop])[0]] for (text,) in free]
    assert stopped[1][0] == free[1][0][:7]
    (row,) = generators(0, 1)
    assert "".join(stream_text(run, prompts[1], 40, how, row, [stop])) == stopped[1][0]
    for text in write_texts(run, prompts, Task(Beams(3, n_best=3), 40, stops=[stop]))[1]:
        assert stop not in text
