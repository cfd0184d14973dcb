"The parts of the network: what holds for any size, any width, any batch."
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from diffusion_book.blocks import (Attention, Downsample, ResBlock, Upsample, check_attention, check_clock, check_norm,
                                   group_norm, time_embedding, zeroed)

few = settings(max_examples=25, deadline=None)

def normal(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

def awake(part):
    "Ordinary first weights instead of zeros, so that a part does something."
    torch.manual_seed(0)
    for layer in part.modules(): getattr(layer, "reset_parameters", lambda: None)()
    return part

@few
@given(st.lists(st.floats(0, 1000), min_size=1, max_size=5), st.integers(1, 64).map(lambda n: 2*n))
def test_embedding_is_the_formula(times, dim):
    clock = torch.tensor(times, dtype=torch.float32)
    e = time_embedding(clock, dim)
    exact = [[f(t*10_000**(-k/(dim//2))) for f in (math.cos, math.sin) for k in range(dim//2)] for t in clock.double().tolist()]
    torch.testing.assert_close(e.double(), torch.tensor(exact, dtype=torch.float64), rtol=0, atol=3e-4)   # float32 angles up to 1000

def test_embedding_moves_in_every_number_and_tells_times_apart():
    e = time_embedding(torch.arange(1, 1001.))
    assert (e.amax(0) - e.amin(0)).min() > 5e-3
    assert (torch.cdist(e, e) + 10*torch.eye(1000)).min() > 1

def test_embedding_of_a_clock_to_one_is_nearly_blind():   # mistake 6: what the right clock is for
    reach = lambda clock: (o := time_embedding(clock, 32)).amax(0) - o.amin(0)
    assert (reach(torch.arange(1, 1001.)/1000) > .2).sum() == 4
    assert (reach(torch.arange(1, 1001.)) > .2).sum() == 28

@pytest.mark.parametrize("dim", [0, 1, 7, -2])
def test_embedding_refuses_odd_lengths(dim):
    with pytest.raises(ValueError, match=f"dim: got {dim}, wanted an even number"): time_embedding(torch.zeros(2), dim)

def test_embedding_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"clock: got shape \(2, 1\), wanted \(batch,\)"): time_embedding(torch.zeros(2, 1))

@few
@given(st.integers(1, 200))
def test_group_norm_takes_any_number_of_channels(channels):
    norm = group_norm(channels)
    assert channels % norm.num_groups == 0 and (norm.num_groups == 1 or channels//norm.num_groups >= 16)

@few
@given(st.integers(1, 5), st.integers(2, 40), st.integers(2, 40), st.integers(1, 9), st.integers(1, 9))
def test_resblock_shape_start_and_gradient(batch, c_in, c_out, h, w):
    x, emb = normal(batch, c_in, h, w).requires_grad_(), normal(batch, 12)
    block = ResBlock(c_in, c_out, 12)
    y = block(x, emb)
    assert y.shape == (batch, c_out, h, w)
    torch.testing.assert_close(y, block.straight(x), rtol=0, atol=0)     # nothing is added at first
    awake(block)(x, emb).square().sum().backward()
    assert x.grad.isfinite().all() and all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())

def test_resblock_drops_in_training_only():
    block = awake(ResBlock(8, 8, 4, dropout=.5))
    x, emb = normal(2, 8, 5, 5), normal(2, 4)
    torch.manual_seed(0)
    assert not torch.equal(block(x, emb), block(x, emb))
    block.eval()
    assert torch.equal(block(x, emb), block(x, emb))

@few
@given(st.integers(1, 3), st.sampled_from([1, 2, 4]), st.integers(1, 6), st.integers(1, 6))
def test_attention_is_torchs(batch, heads, h, w):
    channels = 16*heads
    ours, theirs = awake(Attention(channels, head_width=16)), nn.MultiheadAttention(channels, heads, batch_first=True)
    assert ours.heads == heads
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.qkv.weight[..., 0, 0]); theirs.in_proj_bias.copy_(ours.qkv.bias)
        theirs.out_proj.weight.copy_(ours.out.weight[..., 0, 0]); theirs.out_proj.bias.copy_(ours.out.bias)
    x = normal(batch, channels, h, w)
    places = ours.norm(x).flatten(2).transpose(1, 2)
    torch.testing.assert_close(ours(x) - x, theirs(places, places, places)[0].transpose(1, 2).reshape(x.shape), rtol=0, atol=2e-5)

@few
@given(st.integers(1, 300))
def test_attention_takes_any_number_of_channels(channels):
    look = Attention(channels)
    assert channels % look.heads == 0 and (look.heads == 1 or channels//look.heads >= 64)
    x = normal(2, channels, 2, 3)
    assert torch.equal(look(x), x)

def test_attention_does_not_know_places():
    look, order = awake(Attention(32)), torch.randperm(30, generator=torch.Generator().manual_seed(1))
    shuffled = lambda x: x.flatten(2)[..., order].reshape(x.shape)
    x = normal(2, 32, 5, 6)
    torch.testing.assert_close(look(shuffled(x)), shuffled(look(x)), rtol=0, atol=1e-5)

def test_down_and_up_meet_again():
    x = normal(2, 6, 8, 10)
    small = Downsample(6, 9)(x)
    assert small.shape == (2, 9, 4, 5) and Upsample(9, 6)(small).shape == x.shape

@pytest.mark.parametrize("part", [ResBlock(32, 48, 16), Attention(32), Downsample(32, 48), Upsample(32, 48), group_norm(32)], ids=lambda p: type(p).__name__)
def test_no_part_depends_on_the_batch(part):   # mistake 16
    part, x, emb = awake(part).train(), normal(5, 32, 6, 6), normal(5, 16, seed=1)
    extra = (emb,) if isinstance(part, ResBlock) else ()
    torch.testing.assert_close(part(x, *extra)[3:4], part(x[3:4], *(e[3:4] for e in extra)), rtol=0, atol=1e-5)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in part.modules())

def test_zeroed_layers_learn():
    layer = zeroed(nn.Conv2d(2, 3, 3))
    y = layer(normal(1, 2, 5, 5))
    assert (y == 0).all()
    y.sum().backward()
    assert (layer.weight.grad != 0).any()

def test_checkers_accept_the_right_and_refuse_the_wrong():
    check_clock(time_embedding)
    with pytest.raises(AssertionError, match="different times look the same"): check_clock(lambda c, d: time_embedding(c/1000, d))
    with pytest.raises(AssertionError, match="wrong axis"): check_clock(lambda c, d: time_embedding(c*0 + c.mean() + torch.arange(len(c)), d))
    check_norm(lambda x, g: nn.functional.group_norm(x, g))
    with pytest.raises(AssertionError, match="over the batch"): check_norm(lambda x, g: nn.functional.batch_norm(x, None, None, training=True))
    with pytest.raises(AssertionError, match="by channel"): check_norm(lambda x, g: nn.functional.group_norm(x, x.shape[1]))
    check_attention(nn.functional.scaled_dot_product_attention)
    with pytest.raises(AssertionError, match="sqrt"): check_attention(lambda q, k, v: (q @ k.T).softmax(-1) @ v)
    with pytest.raises(AssertionError, match="over keys"): check_attention(lambda q, k, v: (q @ k.T/4).softmax(0) @ v)
