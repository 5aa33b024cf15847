"""Generation: equal to `transformers`, with and without a cache, past the longest sequence, to its end."""

import io
import sys
from pathlib import Path

import pytest
import torch

from cairn.config.model import BERTSection, GPTSection
from cairn.config.schema import PretrainConfig
from cairn.data.tokenizer import BytesTokenizer
from cairn.decode.generate import allowed_tokens, generate, generate_text, stream, stream_text
from cairn.decode.sample import Sampling, generators
from cairn.errors import UserError
from cairn.models.build import build_model
from cairn.models.gpt import GPT
from cairn.train.run import LoadedRun

GREEDY = Sampling(temperature=0)
TINY = {"n_layer": 2, "n_head": 4, "d_model": 32, "max_seq_len": 24, "init_std": 0.3}
LLAMA = {"norm": "rmsnorm", "position": "rope", "activation": "swiglu", "bias": False, "n_kv_head": 2}


def tiny(seed: int = 0, vocab_size: int = 64, **keys: object) -> GPT:
    torch.manual_seed(seed)
    model = build_model(GPTSection.model_validate(TINY | keys), vocab_size)
    assert isinstance(model, GPT)
    return model.eval()


def byte_run(**keys: object) -> LoadedRun:
    tokenizer = BytesTokenizer()
    model = tiny(vocab_size=tokenizer.vocab_size, **keys)
    return LoadedRun(PretrainConfig(model=model.section), model.section, model, tokenizer, step=1)


def test_greedy_equals_transformers_token_by_token() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from cairn.hub import gpt2
    from cairn.hub.convert import to_hub

    model = tiny(max_seq_len=64)
    theirs = GPT2LMHeadModel(GPT2Config(**gpt2.to_config(model.section, 128))).eval()
    weights = to_hub(dict(model.named_parameters()), gpt2.table(model.section))
    missing = theirs.load_state_dict(weights, strict=False).missing_keys
    assert set(missing) <= {"lm_head.weight"}
    prompts = torch.randint(128, (3, 7))
    expected = theirs.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=40,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=-1,
    )
    ours = generate(model, prompts.tolist(), 40, GREEDY)
    assert ours == expected[:, 7:].tolist()
    assert len({tuple(row) for row in ours}) == 3


@pytest.mark.parametrize(
    "keys",
    [{}, LLAMA, {"position": "alibi"}, {"position": "t5"}, {"position": "sinusoidal"}, {"sliding_window": 5}],
    ids=["gpt2", "llama", "alibi", "t5", "sinusoidal", "window"],
)
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.9, top_k=20, top_p=0.9)], ids=["greedy", "sampled"])
def test_cache_changes_nothing_even_past_the_longest_sequence(keys: dict[str, object], sampling: Sampling) -> None:
    model = tiny(**keys).double()
    prompts = [[1, 2, 3], [4, 5, 6], list(range(40))]
    cached = generate(model, prompts, 60, sampling, seed=3)
    assert cached == generate(model, prompts, 60, sampling, seed=3, cached=False)
    assert [len(row) for row in cached] == [60] * 3


def test_full_context_restarts_from_its_last_half() -> None:
    model = tiny().double()  # max_seq_len 24
    prompt = torch.randint(64, (1, 24))
    tokens = stream(model, prompt, GREEDY, generators(0, 1))
    first, second = int(next(tokens)), int(next(tokens))
    with torch.no_grad():
        assert first == int(model(prompt)[0, -1].argmax())
        half = torch.cat([prompt[0, -11:], torch.tensor([first])])[None]
        assert second == int(model(half)[0, -1].argmax())


def test_rows_do_not_depend_on_their_batch() -> None:
    model = tiny().double()
    prompts = [[1, 2, 3], [7], [4, 5, 6]]
    together = generate(model, prompts, 12, Sampling(), seed=9)
    assert together[0] == generate(model, prompts[:1], 12, Sampling(), seed=9)[0]
    assert together[:2] == generate(model, prompts[:2], 12, Sampling(), seed=9)
    assert together != generate(model, prompts, 12, Sampling(), seed=10)
    same = generate(model, [[1, 2]] * 4, 12, Sampling(), seed=9)
    assert len({tuple(row) for row in same}) == 4


def test_each_row_stops_before_its_end_of_document() -> None:
    model = tiny().double()
    prompts = [[i, i + 1] for i in range(16)]
    endless = generate(model, prompts, 30, Sampling(), seed=2)
    eos = int(torch.tensor(endless).flatten().mode().values)  # the most frequent one, so that many rows end
    ended = generate(model, prompts, 30, Sampling(), seed=2, eos_id=eos)
    expected = [row[: row.index(eos)] if eos in row else row for row in endless]
    assert ended == expected
    assert len({len(row) for row in ended}) > 2


def test_forbidden_tokens_are_never_drawn() -> None:
    run = byte_run()
    rows = run.model.embed.token.weight.shape[0]
    allowed = allowed_tokens(run.tokenizer, rows)
    assert allowed[run.tokenizer.eos_id]
    assert not allowed[run.tokenizer.vocab_size :].any()
    assert not allowed[run.tokenizer.pad_id]
    assert allowed[run.tokenizer.encode("a")[0]]
    drawn = generate(run.model, [[1, 2]] * 8, 60, Sampling(temperature=3.0), allowed=allowed)
    assert {token for row in drawn for token in row} <= set(allowed.nonzero()[:, 0].tolist())


def test_text_streams_whole_characters() -> None:
    run = byte_run()
    (row,) = generators(4, 1)
    pieces = list(stream_text(run, "é", 80, Sampling(temperature=2.0), row))
    assert len(pieces) > 10
    assert "".join(pieces) == generate_text(run, "é", 80, temperature=2.0, seed=4)
    assert generate_text(run, "é", 80, seed=4) != generate_text(run, "é", 80, seed=5)


def test_multibyte_character_is_held_back_until_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    run = byte_run()
    ids = run.tokenizer.encode("añ漢z")
    tokens = iter([torch.tensor([i]) for i in [*ids, run.tokenizer.eos_id]])
    monkeypatch.setattr("cairn.decode.generate.stream", lambda *_: tokens)
    assert [p for p in stream_text(run, "x", 99, GREEDY, generators(0, 1)[0]) if p] == ["a", "ñ", "漢", "z"]


def test_empty_prompt_begins_a_document() -> None:
    run = byte_run()
    logits = run.model(torch.tensor([[run.tokenizer.eos_id]]))[0, -1]
    logits[~allowed_tokens(run.tokenizer, len(logits))] = -torch.inf
    first = int(logits.argmax())
    text = generate_text(run, "", 1, temperature=0)
    assert text == ("" if first == run.tokenizer.eos_id else run.tokenizer.decode([first]))


def test_bert_is_refused() -> None:
    tokenizer = BytesTokenizer()
    section = BERTSection(n_layer=1, n_head=2, d_model=16, max_seq_len=16)
    config = PretrainConfig.model_validate({"model": {"name": "bert"}, "objective": {"name": "masked"}})
    run = LoadedRun(config, section, build_model(section, tokenizer.vocab_size), tokenizer, step=1)
    with pytest.raises(UserError, match="bert model predicts masked tokens and cannot generate"):
        generate_text(run, "x")


def test_command_prints_prompt_and_samples(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from cairn.decode import __main__

    run = byte_run()
    monkeypatch.setattr("cairn.train.run.load_model", lambda folder, device: run)
    monkeypatch.setattr(sys, "stdin", io.StringIO("from stdin"))
    command = ["cairn", str(tmp_path), "--prompt", "-", "--samples", "2", "--max-new-tokens", "9", "--seed", "4"]
    monkeypatch.setattr(sys, "argv", command)
    __main__.main()
    printed = capsys.readouterr().out
    assert printed.startswith("from stdin" + generate_text(run, "from stdin", 9, temperature=0.8, seed=4))
    assert printed.count("from stdin") == 2
    monkeypatch.setattr(sys, "argv", [*command, "--samples", "0"])
    with pytest.raises(UserError, match="samples"):
        __main__.main()
