import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cairn.errors import UserError
from cairn.ops.attention import _log, attention, choose
from cairn.ops.masks import Mask

B, H, T, D = 2, 4, 150, 16  # T: one whole block of queries and a part of one


def mask_of(kind: str) -> Mask:
    documents = torch.arange(T)[None] // torch.tensor([[40], [61]])
    padding = torch.arange(T)[None] < torch.tensor([[T], [90]])
    return {
        "causal": Mask(causal=True),
        "bidirectional": Mask(),
        "window": Mask(causal=True, window=20),
        "both sides": Mask(window=20),
        "documents": Mask(causal=True, document_ids=documents),
        "padding": Mask(key_padding=padding),
        "all": Mask(causal=True, window=50, document_ids=documents, key_padding=padding),
    }[kind]


def seen_by_hand(kind: str) -> Tensor:
    """The same rules, written as loops."""
    mask, out = mask_of(kind), torch.zeros(B, T, T, dtype=torch.bool)
    for b in range(B):
        for i in range(T):
            for j in range(T):
                ok = not mask.causal or j <= i
                ok &= mask.window is None or abs(i - j) < mask.window
                ok &= mask.document_ids is None or bool(mask.document_ids[b, i] == mask.document_ids[b, j])
                ok &= mask.key_padding is None or bool(mask.key_padding[b, j])
                out[b, i, j] = ok
    return out


KINDS = ["causal", "bidirectional", "window", "both sides", "documents", "padding", "all"]


def inputs(groups: int = 1, with_bias: bool = False, grad: bool = True) -> list[Tensor]:
    torch.manual_seed(0)
    tensors = [torch.randn(B, h, T, D) for h in (H, H // groups, H // groups)]
    if with_bias:
        tensors.append(torch.randn(1, H, T, T))
    return [x.requires_grad_(grad) for x in tensors]


@pytest.mark.parametrize("kind", ["window", "all"])
def test_reference_is_the_definition(kind: str) -> None:
    q, k, v = inputs(grad=False)
    seen = seen_by_hand(kind)
    expected = torch.zeros_like(q)
    for b in range(B):
        for i in range(T):
            keys = seen[b, i].nonzero().flatten()
            if len(keys):
                weights = torch.einsum("hd,hkd->hk", q[b, :, i], k[b][:, keys]) / D**0.5
                expected[b, :, i] = torch.einsum("hk,hkd->hd", weights.softmax(-1), v[b][:, keys])
    torch.testing.assert_close(attention(q, k, v, mask_of(kind), backend="reference"), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("backend", ["sdpa", "blocked"])
def test_backend_equals_reference_forward_and_backward(backend: str, kind: str, groups: int, with_bias: bool) -> None:
    results = []
    for name in ("reference", backend):
        tensors = inputs(groups, with_bias)
        q, k, v, *bias = tensors
        out = attention(q, k, v, mask_of(kind), *bias, backend=name)
        out.backward(torch.linspace(-1, 1, out.numel()).view_as(out))
        results.append([out, *(x.grad for x in tensors)])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_flex_equals_reference_forward(kind: str, with_bias: bool) -> None:
    q, k, v, *bias = inputs(2, with_bias, grad=False)
    got = attention(q, k, v, mask_of(kind), *bias, backend="flex")
    torch.testing.assert_close(got, attention(q, k, v, mask_of(kind), *bias, backend="reference"), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_queries_see_those_of_other_keys_that_are_of_their_document(padded: bool, groups: int) -> None:
    n_key = 90
    q, k, v = inputs(groups, grad=False)
    k, v = k[:, :, :n_key], v[:, :, :n_key]
    ours = torch.arange(T)[None] // torch.tensor([[40], [61]])
    theirs = torch.arange(n_key)[None] // torch.tensor([[20], [70]])
    n_real = [n_key, 75] if padded else [n_key, n_key]
    expected = torch.zeros_like(q)
    for b in range(B):
        for i, document in enumerate(ours[b].tolist()):
            keys = [j for j, other in enumerate(theirs[b].tolist()) if other == document and j < n_real[b]]
            for h in range(H if keys else 0):
                weights = (k[b, h // groups, keys] @ q[b, h, i] / D**0.5).softmax(0)
                expected[b, h, i] = weights @ v[b, h // groups, keys]
    real = torch.arange(n_key)[None] < torch.tensor(n_real)[:, None] if padded else None
    mask = Mask(document_ids=ours, key_document_ids=theirs, key_padding=real)
    for backend in ("reference", "sdpa", "flex", "blocked"):
        got = attention(q, k, v, mask, backend=backend)  # type: ignore[arg-type]
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("backend", ["reference", "sdpa", "flex", "blocked"])
@pytest.mark.parametrize("window", [None, 20])
def test_queries_behind_a_cache_see_as_in_the_whole(backend: str, window: int | None) -> None:
    q, k, v = inputs(2, grad=False)
    whole = attention(q, k, v, Mask(causal=True, window=window), backend="reference")
    for n in (1, 30):
        got = attention(q[:, :, -n:], k, v, Mask(causal=True, window=window, offset=T - n), backend=backend)
        torch.testing.assert_close(got, whole[:, :, -n:], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("backend", ["sdpa", "blocked"])
def test_bf16_is_as_close_as_its_rounding(backend: str) -> None:
    q, k, v = inputs(grad=False)
    exact = attention(q, k, v, Mask(causal=True), backend="reference")
    got = attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), Mask(causal=True), backend=backend)
    assert (got.float() - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("backend", ["reference", "sdpa", "blocked"])
def test_dropout_zeroes_its_share_keeps_the_mean_and_repeats_with_the_seed(backend: str) -> None:
    # Equal scores and one-hot values: the output is the dropped probabilities themselves.
    n = 64
    q = k = torch.zeros(4, 8, n, n)
    v = torch.eye(n).expand(4, 8, n, n)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return attention(q, k, v, Mask(), dropout=0.25, backend=backend) * n

    probs = run(1)
    kept = probs != 0
    assert abs(kept.float().mean() - 0.75) < 0.01
    assert abs(probs.mean() - 1) < 0.01
    torch.testing.assert_close(probs[kept], torch.full_like(probs[kept], 1 / 0.75))
    assert torch.equal(run(1), probs)
    assert not torch.equal(run(2), probs)


def test_blocked_dropout_has_the_gradient_of_what_it_computed() -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(1, 2, 9, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(7)
        return attention(q, k, v, Mask(causal=True), dropout=0.3, backend="blocked")

    assert torch.autograd.gradcheck(run, tensors)


def test_asking_for_a_backend_that_cannot_says_why() -> None:
    q, k, v = inputs()
    with pytest.raises(UserError, match="no backward pass on a CPU"):
        attention(q, k, v, Mask(), backend="flex")
    with pytest.raises(UserError, match="has no dropout"):
        attention(q, k, v, Mask(), dropout=0.1, backend="flex")
    with pytest.raises(UserError, match="made for CPUs"):
        attention(*(x.to("meta") for x in (q, k, v)), Mask(), backend="blocked")
    with pytest.raises(UserError, match="heads of 16 or wider"):
        attention(*(torch.empty(1, 2, 8, 8, device="meta") for _ in range(3)), Mask(), backend="flex")


def test_auto_keeps_memory_linear_for_long_sequences() -> None:
    long = torch.empty(8, 16, 4096, 1)
    assert choose(long, long, Mask(causal=True), None, 0.0)[0] == "sdpa"
    assert choose(long[:, :, :256], long[:, :, :256], Mask(causal=True), None, 0.0)[0] == "blocked"


@pytest.mark.parametrize(
    ("width", "mask", "dropout", "backend"),
    [
        (64, Mask(causal=True), 0.0, "sdpa"),
        (64, Mask(causal=True, window=8), 0.0, "flex"),
        (64, Mask(causal=True, window=8), 0.1, "sdpa"),
        (8, Mask(causal=True, window=8), 0.0, "sdpa"),  # too narrow for the kernel
    ],
)
def test_what_auto_takes_on_a_gpu(width: int, mask: Mask, dropout: float, backend: str) -> None:
    with FakeTensorMode():
        q = torch.empty(1, 2, 32, width, device="cuda")
        assert choose(q, q, mask, None, dropout)[0] == backend


@pytest.mark.parametrize("compiled", [False, True])
def test_what_auto_takes_is_logged_once(compiled: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "cairn")
    _log.cache_clear()

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, Mask(causal=True))

    if compiled:
        run = torch.compile(run, backend="eager", fullgraph=True)
    q, k, v = inputs(grad=False)
    for _ in range(3):
        run(q, k, v)
        attention(q, k, v, Mask(causal=True), backend="sdpa")
    said = [record.message for record in caplog.records if record.name == "cairn"]
    assert [line.split(" (")[0] for line in said] == ["attention: blocked"]
