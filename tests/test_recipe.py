"The optimiser of the recipe: against torch's own, against what orthogonal means, and inside the training loop."
import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from diffusion_book.images import load_digits_images
from diffusion_book.objective import Denoiser
from diffusion_book.recipe import MuonAdamW, is_matrix, muon, orthogonal
from diffusion_book.schedules import cosine_schedule
from diffusion_book.training import adamw, train
from diffusion_book.unet import UNet


@given(rows=st.integers(2, 40), columns=st.integers(2, 40), seed=st.integers(0, 99))
def test_orthogonal_keeps_directions_and_levels_sizes(rows, columns, seed):
    g = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    u, s, vt = torch.linalg.svd(g, full_matrices=False)
    turned = u.mT @ orthogonal(g) @ vt.mT
    strong = s > .05*s[0]       # five rounds bring a singular value of a twentieth or more of the length to near 1
    assert (turned.diagonal()[strong] > .4).all() and (turned.diagonal() < 1.3).all()
    assert (turned - turned.diagonal().diag()).abs().max() < .1     # no direction is turned; bf16 rounds to 1 in 256


def test_orthogonal_forgets_the_length():
    g = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    assert torch.equal(orthogonal(g), orthogonal(1024*g))       # a power of two: no rounding differs
    assert torch.equal(orthogonal(g), orthogonal(g.mT).mT)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon of its own")
def test_the_step_is_torchs_own():
    def walk(make):
        torch.manual_seed(0)
        net = nn.Linear(40, 32, bias=False)
        first, optimizer, g = net.weight.detach().clone(), make(net.parameters()), torch.Generator().manual_seed(1)
        for _ in range(5):
            optimizer.zero_grad()
            (net(torch.randn(64, 40, generator=g)) - 1).square().mean().backward()
            optimizer.step()
        return net.weight.detach() - first
    ours = walk(lambda p: MuonAdamW(p, 1e-2, weight_decay=.01))
    theirs = walk(lambda p: torch.optim.Muon(p, lr=1e-2, weight_decay=.01, momentum=.95, adjust_lr_fn="match_rms_adamw"))
    # both iterate in bfloat16, in another order of operations: rounding of 1 in 256 a factor, some tens of factors
    assert nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > .98
    assert abs(ours.norm()/theirs.norm() - 1) < .03


def test_what_is_no_matrix_gets_adamw():
    torch.manual_seed(0)
    net = UNet(width=(16, 32))
    other, g = copy.deepcopy(net), torch.Generator().manual_seed(1)
    x, clock = torch.randn(4, 1, 8, 8, generator=g), torch.full((4,), 500.)
    optimizers = muon(net.parameters(), 1e-3), adamw(other.parameters(), 1e-3)
    for n, optimizer in zip((net, other), optimizers):
        (n(x, clock) - x).square().mean().backward()
        optimizer.step()
    for (name, p), q in zip(net.named_parameters(), other.parameters()):
        same = torch.equal(p, q)
        assert same or is_matrix(p), f"{name} is no matrix and moved otherwise"
    assert not is_matrix(net.exit[-1].weight) and not is_matrix(net.exit[-1].bias) and is_matrix(net.middle.conv1.weight)


def test_a_run_with_muon_goes_on_bit_for_bit(tmp_path):
    digits = load_digits_images()[0][:200]
    def fresh(seed=0):
        torch.manual_seed(seed)
        return Denoiser(UNet(width=(16, 32)), cosine_schedule(), "v")
    class PowerCut(Exception): pass
    def cut(run, loss):
        if run.step == 4: raise PowerCut
    said = dict(steps=8, optimizer=muon, device="cpu", precision="fp32", progress=False)
    whole = train(fresh(), digits, **said)
    with pytest.raises(PowerCut): train(fresh(), digits, tmp_path, save_every=0, watch=cut, **said)
    rest = train(fresh(9), digits, tmp_path, resume=True, **said)
    assert all(torch.equal(p, q) for p, q in zip(whole.denoise.net.parameters(), rest.denoise.net.parameters(), strict=True))
    with pytest.raises(ValueError, match="optimizer was muon, now adamw"):
        train(fresh(), digits, tmp_path, resume=True, **said | dict(optimizer=adamw))
