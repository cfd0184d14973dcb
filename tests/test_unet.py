"The U-Net: any size, any channels, any depth; what it starts as; what it must never do."
import copy
import hashlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from diffusion_book.blocks import Attention, ResBlock
from diffusion_book.unet import UNet, check_count, check_fold, check_reach, check_widths

ROOT = Path(__file__).resolve().parents[1]
sizes = st.integers(1, 64)

def normal(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

def awake(net):
    "Ordinary first weights instead of zeros, so that every part does something."
    torch.manual_seed(0)
    for m in net.modules():
        if isinstance(m, ResBlock): m.conv2.reset_parameters()
        if isinstance(m, Attention): m.out.reset_parameters()
    net.exit[-1].reset_parameters()
    return net

@settings(max_examples=40, deadline=None)
@given(sizes, sizes, st.integers(1, 4), st.integers(1, 3), st.integers(1, 2), st.integers(1, 3))
def test_any_size_channels_and_depth(h, w, channels, depth, blocks, patch):
    net = awake(UNet(channels, width=(4,)*depth, blocks=blocks, patch=patch))
    x = normal(2, channels, h, w)
    y = net(x, torch.tensor([1., 999.]))
    assert y.shape == x.shape and y.isfinite().all() and (y != 0).any()

@settings(max_examples=15, deadline=None)
@given(sizes, sizes)
def test_padding_is_of_zeros_right_and_below(h, w):
    net = awake(UNet(width=(4, 6)))
    x, m = normal(1, 1, h, w), net.multiple
    padded = torch.zeros(1, 1, -(-h//m)*m, -(-w//m)*m)
    padded[..., :h, :w] = x
    torch.testing.assert_close(net(x, torch.ones(1)), net(padded, torch.ones(1))[..., :h, :w], rtol=0, atol=1e-5)

def test_starts_by_predicting_zero():
    assert (UNet()(normal(2, 1, 28, 28), torch.ones(2)) == 0).all()

def test_default_network_is_the_one_that_ships():
    "Names and shapes of the parameters are a contract with stored weights: a change here makes them unreadable."
    net = UNet()
    names = "\n".join(f"{k} {tuple(v.shape)}" for k, v in sorted(net.state_dict().items()))
    assert sum(p.numel() for p in net.parameters()) == 1_785_284
    assert hashlib.sha256(names.encode()).hexdigest()[:16] == "8c7b8400b013bbd7"

@pytest.mark.parametrize("width, parameters", [((16, 32, 32), 175_892), ((32, 64), 449_252), ((64, 128), 1_785_284)])
def test_parameters_are_counted(width, parameters):   # mistake 12
    assert sum(p.numel() for p in UNet(width=width).parameters()) == parameters

def test_widths_are_plain_numbers():
    net = UNet(width=(8, 16, 32))
    assert [level[0][0][0].conv1.out_channels for level in net.down] == [8, 16, 32]

def test_door_saves_the_work():
    def work(net):
        with FlopCounterMode(display=False) as counter: net(torch.zeros(1, 1, 28, 28), torch.ones(1))
        return counter.get_total_flops()
    assert 3.9 < work(UNet(patch=1))/work(UNet()) < 4.3

def test_a_result_does_not_depend_on_the_batch():   # mistake 16
    net, x, clock = awake(UNet(width=(16, 32))).train(), normal(6, 1, 28, 28), torch.linspace(1, 1000, 6)
    torch.testing.assert_close(net(x, clock)[2:3], net(x[2:3], clock[2:3]), rtol=0, atol=1e-5)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules())

def test_last_layer_is_linear():   # mistake 18
    net = awake(UNet(width=(8, 16)))
    assert isinstance(net.exit[-1], nn.Conv2d)
    with torch.no_grad():
        before = net(normal(1, 1, 8, 8), torch.ones(1))
        for p in net.exit[-1].parameters(): p *= 100
        torch.testing.assert_close(net(normal(1, 1, 8, 8), torch.ones(1)), 100*before, rtol=1e-4, atol=1e-4)

def test_every_parameter_is_reached():
    net = awake(UNet(width=(16, 32, 32), blocks=2, attention=2))
    net(normal(2, 1, 28, 28), torch.tensor([10., 700.])).square().mean().backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]

def test_time_matters_only_to_the_timed():
    x = normal(1, 1, 28, 28)
    for timed in (True, False):
        net = awake(UNet(width=(16, 32), timed=timed))
        assert torch.equal(net(x, torch.tensor([20.])), net(x, torch.tensor([900.]))) != timed

def test_skips_and_time_cost_no_parameters():
    shapes = lambda **kw: {k: v.shape for k, v in UNet(width=(16, 32), **kw).state_dict().items()}
    assert shapes() == shapes(skips=False) == shapes(timed=False)

def test_without_skips_the_bridges_carry_nothing():
    x = normal(1, 1, 16, 16)
    outs = []
    for skips in (True, False):
        net = awake(UNet(width=(8, 16), skips=skips))
        net.down[0][1].conv.weight.data.zero_(); net.down[0][1].conv.bias.data.zero_()   # nothing goes deeper
        outs.append((net(x, torch.ones(1)) - net(2*x + normal(1, 1, 16, 16, seed=1), torch.ones(1))).abs().max())
    assert outs[0] > 1e-3 and outs[1] == 0

def test_config_makes_it_again():
    net = UNet(3, (8, 16), 2, 1, 0, .1, False, False)
    again = UNet(**json.loads(json.dumps(net.config)))
    again.load_state_dict(net.state_dict())
    assert again.config == net.config

@pytest.mark.parametrize("change", [dict(memory_format=torch.channels_last), dict(dtype=torch.float64)], ids=["channels_last", "float64"])
def test_formats_agree(change):
    net = awake(UNet(width=(16, 32)))
    x, clock = normal(2, 1, 28, 28), torch.tensor([3., 500.])
    y, other = net(x, clock), copy.deepcopy(net).to(**change)
    if "dtype" in change: other.emb.register_forward_pre_hook(lambda m, args: (args[0].double(),)); x = x.double()
    torch.testing.assert_close(other(x, clock).float(), y, rtol=0, atol=1e-4)

@pytest.mark.parametrize("settings, wanted", [
    (dict(width=()), "one level"), (dict(blocks=0), "at least 1"), (dict(patch=0), "at least 1"), (dict(channels=0), "at least 1"),
    (dict(width=(7, 8)), "even number"), (dict(width=(8, 1)), "at least 2 channels")])
def test_refuses_what_makes_no_network(settings, wanted):
    with pytest.raises(ValueError, match=wanted): UNet(**settings)

def test_refuses_wrong_input():
    net, x = UNet(width=(4,)), normal(2, 1, 8, 8)
    for args, wanted in [((x[:, 0], torch.ones(2)), "xt: got shape"), ((x.expand(2, 3, 8, 8), torch.ones(2)), r"wanted \(batch, 1, height, width\)"),
                         ((x, torch.ones(1)), r"clock: got shape \(1,\) for a batch of 2"), ((x, torch.ones(2), "shoe"), "cond: got str")]:
        with pytest.raises(ValueError, match=wanted): net(*args)

def test_checkers_accept_the_right_and_refuse_the_wrong():
    check_fold(torch.nn.functional.pixel_unshuffle)
    with pytest.raises(AssertionError, match="averaged"): check_fold(lambda x, p: torch.nn.functional.avg_pool2d(x, p).repeat(1, p*p, 1, 1))
    with pytest.raises(AssertionError, match="permute"): check_fold(lambda x, p: x.reshape(len(x), -1, x.shape[2]//p, x.shape[3]//p))
    check_count(lambda i, o, k, s: (i*o*k*k + o, i*o*k*k*s*s))
    with pytest.raises(AssertionError, match="bias"): check_count(lambda i, o, k, s: (i*o*k*k, i*o*k*k*s*s))
    with pytest.raises(AssertionError, match="multiply-add is one"): check_count(lambda i, o, k, s: (i*o*k*k + o, 2*i*o*k*k*s*s))
    def reach(layers, ignore_stride=False):
        seen, jump = 1, 1
        for k, s in layers: seen, jump = seen + (k - 1)*jump, jump*(1 if ignore_stride else s)
        return seen
    check_reach(reach)
    with pytest.raises(AssertionError, match="the gradient says"): check_reach(lambda layers: reach(layers, True))
    check_widths(lambda b, ms: tuple(b*m for m in ms))
    with pytest.raises(AssertionError, match="compounded"): check_widths(lambda b, ms: (64, 128, 512, 4096))

def test_stored_ablations_say_what_they_are():
    stored = json.loads((ROOT/"nbs"/"results"/"ablations.json").read_text())
    assert set(stored["runs"]) == {"whole", "without skips", "blind to the time"}
    for runs in stored["runs"].values():
        assert len({r["seed"] for r in runs}) >= 3 and all(len(r["loss"]) == len(stored["times"]) for r in runs)
    assert stored["parameters"] == sum(p.numel() for p in UNet(width=tuple(stored["width"])).parameters())
    assert stored["command"].startswith("python benchmarks/ablations.py") and stored["machine"]["versions"]["torch"]
