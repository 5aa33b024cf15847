from itertools import pairwise

import pytest
import torch
from torch import Tensor

from cairn.config.finetune import Head
from cairn.config.model import BERTSection, GPTSection
from cairn.errors import UserError
from cairn.models.build import build_model, count_parameters, flops_per_token
from cairn.models.headed import Headed

SMALL = {"n_layer": 2, "n_head": 4, "d_model": 32, "max_seq_len": 48}
POSITIONS = ["learned", "sinusoidal", "t5", "rope", "alibi", "none"]
STYLES = [
    {},
    {"norm": "rmsnorm", "activation": "swiglu", "bias": False, "n_kv_head": 2, "qk_norm": True},
    {"norm_position": "post", "activation": "relu2", "tie_embeddings": False, "norm_affine": False, "embed_norm": True},
]


def ids(*shape: int) -> Tensor:
    return torch.randint(200, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("style", range(3))
@pytest.mark.parametrize("window", [None, 7])
def test_gpt_with_a_cache_predicts_as_without(position: str, style: int, window: int | None) -> None:
    torch.manual_seed(0)
    section = GPTSection(**SMALL, **STYLES[style], position=position, sliding_window=window, init_std=0.3)
    model = build_model(section, 200).eval()
    text = ids(2, 20)
    with torch.no_grad():
        whole = model(text)
        cache = model.new_cache(2, 20)
        cuts = [0, 9, 10, 11, 15, 20]
        parts = [model(text[:, a:b], cache=cache) for a, b in pairwise(cuts)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("position", POSITIONS)
def test_gpt_sees_no_future_and_bert_does(position: str) -> None:
    torch.manual_seed(0)
    text = ids(1, 20)
    other = text.clone()
    other[0, 12] += 1
    gpt = build_model(GPTSection(**SMALL, position=position, init_std=0.3), 256).eval()
    changed = (gpt(text) - gpt(other)).abs().amax((0, 2)) > 1e-6
    assert not changed[:12].any()
    assert changed[12:].all()
    bert = build_model(BERTSection(**SMALL, position=position, init_std=0.3), 256).eval()
    assert ((bert(text)["logits"] - bert(other)["logits"]).abs().amax((0, 2)) > 1e-6).all()


@pytest.mark.parametrize("position", [p for p in POSITIONS if p != "none"])
def test_order_matters(position: str) -> None:
    torch.manual_seed(0)
    bert = build_model(BERTSection(**SMALL, position=position, init_std=0.3), 256).eval()
    text = ids(1, 20)
    turned = bert(text.flip(1))["logits"].flip(1)
    assert not torch.allclose(bert(text)["logits"], turned, atol=1e-2)


@pytest.mark.parametrize("section", [GPTSection(**SMALL), BERTSection(**SMALL)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_parameter_learns_and_the_loss_starts_at_the_uniform_one(
    section: GPTSection | BERTSection, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = build_model(section, 200).to(dtype)
    text, labels = ids(4, 20), ids(4, 20).roll(1, 0)
    if isinstance(section, GPTSection):
        loss = model(text, labels=labels)
        uniform = 80 * torch.log(torch.tensor(256.0))
    else:
        sums = model(text, labels=labels, next_sentence_label=torch.tensor([0, 1, 1, 0]))
        loss = sums["masked"] + sums["next_sentence"]
        uniform = 80 * torch.log(torch.tensor(256.0)) + 4 * torch.log(torch.tensor(2.0))
    assert loss.dtype == torch.float32
    assert abs(loss - uniform) < 0.03 * uniform
    loss.backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_documents_of_one_sequence_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    model = build_model(GPTSection(**SMALL, position="rope"), 200)
    text = ids(1, 20)
    packed = model(text, document_ids=(torch.arange(20) >= 8)[None].long())
    torch.testing.assert_close(packed[:, :8], model(text[:, :8]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(packed[:, 8:], model(text[:, 8:]), rtol=1e-4, atol=1e-5)


def test_padding_changes_nothing_for_real_tokens() -> None:
    torch.manual_seed(0)
    model = build_model(BERTSection(**SMALL), 200).eval()
    text = ids(1, 20)
    real = (torch.arange(20) < 13)[None].long()
    torch.testing.assert_close(
        model(text, attention_mask=real)["logits"][:, :13], model(text[:, :13])["logits"], rtol=1e-4, atol=1e-5
    )


def test_checkpointed_activations_give_the_same_gradients_with_dropout() -> None:
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = build_model(GPTSection(**SMALL, dropout=0.2, attention_dropout=0.2, position="t5"), 200)
        model.activation_checkpointing = checkpointed
        torch.manual_seed(1)
        model(ids(2, 20), labels=ids(2, 20)).backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_initial_weights_follow_the_seed_and_the_section() -> None:
    def weights(**keys: object) -> dict[str, Tensor]:
        torch.manual_seed(3)
        return dict(build_model(GPTSection(**SMALL, **keys), 200).named_parameters())  # type: ignore[arg-type]

    scaled, same = weights(), weights(residual_init="same")
    assert torch.equal(scaled["blocks.1.mlp.up.weight"], weights()["blocks.1.mlp.up.weight"])
    assert abs(scaled["embed.token.weight"].std() - 0.02) < 0.001
    torch.testing.assert_close(scaled["blocks.0.mlp.down.weight"] * 2, same["blocks.0.mlp.down.weight"])
    assert not weights(residual_init="zero")["blocks.0.attention.out.weight"].any()


def test_tied_weight_is_one_parameter() -> None:
    tied, untied = (build_model(GPTSection(**SMALL, tie_embeddings=tie), 200) for tie in (True, False))
    assert "head.weight" not in dict(tied.named_parameters())
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 256 * 32
    assert len(tied.state_dict()) == len(list(tied.parameters()))


def test_too_small_or_too_long_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.vocab_size 100 is smaller than the tokenizer's 200"):
        build_model(GPTSection(**SMALL, vocab_size=100), 200)
    with pytest.raises(ValueError, match="49 tokens are more than"):
        build_model(GPTSection(**SMALL), 200)(ids(1, 49))
    model = build_model(GPTSection(**SMALL), 200)
    with pytest.raises(ValueError, match="do not fit a cache of 8"):
        model(ids(1, 9), cache=model.new_cache(1, 8))


def test_flops_are_those_counted_by_hand() -> None:
    section = GPTSection(**SMALL, vocab_size=256)
    matrices = 2 * 12 * 32 * 32 + 256 * 32
    assert flops_per_token(section, 200, 40) == 6 * matrices + 12 * 2 * 32 * 41 / 2
    narrow = GPTSection(**SMALL, vocab_size=256, sliding_window=4)
    assert flops_per_token(narrow, 200, 40) == 6 * matrices + 12 * 2 * 32 * (1 + 2 + 3 + 37 * 4) / 40
    assert count_parameters(section, 200) == sum(p.numel() for p in build_model(section, 200).parameters())


def test_bert_at_given_positions_is_bert_at_its_labels() -> None:
    torch.manual_seed(0)
    model = build_model(BERTSection(**SMALL, init_std=0.3), 200).eval()
    labels = torch.full((2, 20), -100)
    labels[0, [3, 7]] = labels[1, 5] = 11
    results = []
    for given in (None, torch.tensor([[3, 7, 0], [0, 5, 0]])):
        model.zero_grad()
        wanted = labels if given is None else labels.gather(1, given)
        (loss,) = model(ids(2, 20), labels=wanted, target_positions=given).values()
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) > 20
    torch.testing.assert_close(*results)


def test_outputs_of_a_task_are_finer_than_what_the_model_computes_in() -> None:
    model = Headed(GPTSection(**SMALL), 200, Head("token", 1)).bfloat16()
    outputs = model(ids(4, 16))
    rounded = outputs.bfloat16().float()
    assert outputs.dtype == torch.float32
    assert (rounded != outputs).float().mean() > 0.9
    torch.testing.assert_close(rounded, outputs, rtol=2**-8, atol=0)
