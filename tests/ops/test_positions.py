import torch
from transformers.models.t5.modeling_t5 import T5Attention

from cairn.ops.positions import alibi_slopes, rope_table, rotate, sinusoids, t5_buckets


def test_rope_scores_depend_on_the_distance_alone() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8)

    def score(i: int, j: int) -> torch.Tensor:
        tables = [rope_table(torch.tensor([p]), 8, 10000.0) for p in (i, j)]
        return (rotate(q, tables[0]) * rotate(k, tables[1])).sum(-1)

    torch.testing.assert_close(score(5, 2), score(105, 102), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(score(5, 2), score(5, 3), rtol=1e-2)


def test_rope_keeps_its_precision_far_out_in_bf16() -> None:
    q = torch.ones(1, 1, 1, 8, dtype=torch.bfloat16)
    exact = rotate(q.double().float(), rope_table(torch.tensor([100_003]), 8, 10000.0))
    assert (rotate(q, rope_table(torch.tensor([100_003]), 8, 10000.0)) - exact).abs().max() < 0.01


def test_t5_buckets_equal_transformers() -> None:
    distance = torch.arange(-300, 301)
    for causal in (False, True):
        theirs = T5Attention._relative_position_bucket(distance, bidirectional=not causal)
        assert torch.equal(t5_buckets(distance, causal), theirs)


def test_alibi_slopes_are_those_of_the_paper() -> None:
    torch.testing.assert_close(alibi_slopes(8), 0.5 ** torch.arange(1.0, 9.0))
    twelve = alibi_slopes(12)
    torch.testing.assert_close(twelve[:8], alibi_slopes(8))
    torch.testing.assert_close(twelve[8:], 0.5 ** torch.tensor([0.5, 1.5, 2.5, 3.5]))


def test_sinusoids_tell_positions_apart() -> None:
    table = sinusoids(torch.arange(512), 32)
    assert table.dtype == torch.float32
    assert (torch.cdist(table, table) + torch.eye(512)).min() > 0.05
