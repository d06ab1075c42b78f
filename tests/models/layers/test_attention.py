"""Global attention: heads are cut out of one projection, and put together again, without needless copies."""

import torch

from models.layers.attention import Attention, merge_heads, split_heads
from tests.operators import Operators


def test_heads_are_the_channels_of_their_part():
    x = torch.arange(2 * 5 * 24.0).reshape(2, 5, 24)
    parts = split_heads(x, 2, 3)
    for p, part in enumerate(parts):
        assert part.shape == (2, 2, 5, 4)
        for head in range(2):
            start = 8 * p + 4 * head
            assert part[:, head].equal(x[..., start : start + 4])
        assert merge_heads(part).equal(x[..., 8 * p : 8 * (p + 1)])


def test_gradients_of_queries_keys_and_values_are_put_together_in_one_copy():
    """The projection's backward reads what the stack wrote."""
    x = torch.randn(2, 50, 24, requires_grad=True)
    module = Attention(24, 2)
    with Operators() as operators:
        module(x).square().sum().backward()
    assert operators.names.count("stack") == 1
    assert not {"clone", "copy_", "contiguous"} & set(operators.names)
