"""Scores are those of the harness's own model on the exported folder, whatever the batch."""

from pathlib import Path
from typing import Any

import pytest
import torch

from cairn.config.model import BERTSection, GPTSection
from cairn.errors import UserError
from cairn.hub.export_run import export_run
from cairn.train.run import load_model
from tests.evaluate.runs import SMALL, make_rows, make_run, make_task

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from cairn.evaluate.harness import Harness
from cairn.evaluate.tasks import load_tasks

LLAMA = {"norm": "rmsnorm", "position": "rope", "activation": "swiglu", "bias": False, "n_kv_head": 2}
ROWS = make_rows(20)


def ask(kind: str, *args: object) -> Instance:
    return Instance(kind, {}, args, 0)


@pytest.fixture(scope="module", params=[{}, LLAMA], ids=["gpt2", "llama"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Harness, HFLM]:
    """Ours, and the harness's on what `cairn export` wrote."""
    here = tmp_path_factory.mktemp("pair")
    run = make_run(here / "run", GPTSection(**SMALL, **request.param))
    export_run(run, here / "out")
    ours = Harness(load_model(run, torch.device("cpu")), batch_size=3)
    theirs = HFLM(str(here / "out"), device="cpu", batch_size=1, prefix_token_id=ours.run.tokenizer.eos_id)
    return ours, theirs


def test_likelihoods(pair: tuple[Harness, HFLM]) -> None:
    ours, theirs = pair
    asked = [(str(row["query"]), f" {choice}") for row in ROWS for choice in row["choices"]]  # type: ignore[attr-defined]
    asked += [("", "abc"), ("ends in spaces  ", "x"), ("a", "b" * 48), ("q" * 200, "z")]
    greedy = theirs.generate_until([ask("generate_until", "abc", {"max_gen_toks": 1, "until": []})])[0]
    asked.append(("abc", greedy))
    requests = [ask("loglikelihood", *pair) for pair in asked]
    before = ours.cut
    found, expected = ours.loglikelihood(requests), theirs.loglikelihood(requests)
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in expected], abs=1e-3)
    assert [right for _, right in found] == [right for _, right in expected]
    assert found[-1][1]
    lengths = [len((context + continuation).encode()) for context, continuation in asked]
    assert ours.cut - before == sum(length > 49 for length in lengths) > 3


def test_likelihoods_of_whole_texts(pair: tuple[Harness, HFLM]) -> None:
    ours, theirs = pair
    requests = [ask("loglikelihood_rolling", text) for text in [*(row["text"] for row in ROWS), "", "a" * 48, "b" * 49]]
    found, expected = ours.loglikelihood_rolling(requests), theirs.loglikelihood_rolling(requests)
    assert found == pytest.approx(expected, abs=1e-3)
    assert found[20] == 0


@pytest.mark.parametrize("until", [["e"], ["zz", "b c", " "], "a", []], ids=str)
def test_what_is_written(pair: tuple[Harness, HFLM], until: object) -> None:
    ours, theirs = pair
    contexts = [str(row["query"]) for row in ROWS[::2]] + ["x" * 100]
    options = {"until": until, "max_gen_toks": 20}
    requests = [ask("generate_until", context, dict(options)) for context in contexts]
    found = ours.generate_until(requests)
    assert found == theirs.generate_until([ask("generate_until", context, dict(options)) for context in contexts])
    assert len(set(found)) > 3


def test_scores_of_tasks(pair: tuple[Harness, HFLM], tmp_path: Path) -> None:
    files = [str(make_task(tmp_path, kind, ROWS)) for kind in ("choice", "rolling", "last")]
    found, expected = (evaluate(lm, load_tasks(files, None), bootstrap_iters=0, log_samples=False) for lm in pair)
    numbers: list[dict[str, Any]] = [
        {key: value for values in done["results"].values() for key, value in values.items() if isinstance(value, float)}
        for done in (found, expected)
    ]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-4)
    assert {"acc,none", "acc_norm,none", "bits_per_byte,none", "word_perplexity,none"} <= numbers[0].keys()
    assert 0 < numbers[0]["acc_norm,none"] < 1


def test_an_answer_longer_than_the_model_sees_goes_on(pair: tuple[Harness, HFLM]) -> None:
    ours, _ = pair
    options = {"until": [], "max_gen_toks": 60}
    (text,) = ours.generate_until([ask("generate_until", "abc" * 20, options)])
    assert len(text) > 20


def test_sampled_answers_depend_on_their_place_alone(pair: tuple[Harness, HFLM]) -> None:
    ours, _ = pair
    options = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.5, "top_k": 50}
    requests = [ask("generate_until", context, options) for context in ("abc", "xy", "abc", "abc", "abc")]
    found = ours.generate_until(requests)
    ours.batch_size, before = 1, ours.batch_size
    assert ours.generate_until(requests) == found
    ours.batch_size = before
    assert len(set(found)) > 3


def test_refusals(pair: tuple[Harness, HFLM], tmp_path: Path) -> None:
    ours, _ = pair
    with pytest.raises(UserError, match=r"an answer has 49 tokens, and model\.max_seq_len 48"):
        ours.loglikelihood([ask("loglikelihood", "a", "b" * 49)])
    with pytest.raises(UserError, match="an answer has 0 tokens"):
        ours.loglikelihood([ask("loglikelihood", "a", "")])
    bert = load_model(make_run(tmp_path / "bert", BERTSection(**SMALL)), torch.device("cpu"))
    with pytest.raises(
        UserError, match=r"a bert model cannot say how likely a text is.* give a run of a causal language model"
    ):
        Harness(bert, 8)
