"The scores against scipy and scikit-learn on the same features, against closed forms, by properties, and against bad input."
import math

import pytest
import scipy.linalg
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.neighbors import NearestNeighbors

from diffusion_book.images import load_digits_images
from diffusion_book.metrics import (
    Moments, as_saved, class_histogram, classification_accuracy_score, covered, frechet_distance, kernel_distance, kernel_sums, moments_of,
    patch_features, precision_recall, radii, shipped_moments, unevenness)
from diffusion_book.pictures import load_fashion

seeds, some = st.integers(0, 10_000), settings(deadline=None, max_examples=20)


def normal(*shape, seed=0): return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def skewed(n, d, seed=0):
    "Features that are neither standard nor independent."
    return (normal(n, d, seed=seed).exp() + .3*normal(n, 1, seed=seed + 1)) @ (torch.eye(d, dtype=torch.float64) + .2*normal(d, d, seed=7))


# ------------------------------------------------------------------ moments
@given(seeds, st.lists(st.integers(1, 30), min_size=1, max_size=6))
@some
def test_moments_do_not_depend_on_the_batches(seed, sizes):
    x = 1000 + skewed(sum(sizes) + 2, 3, seed)    # far from zero: sums of squares would lose digits
    m = Moments(x[:2])
    for part in x[2:].split(sizes): m.update(part)
    torch.testing.assert_close((m.mean, m.cov), (x.mean(0), x.T.cov()), rtol=1e-10, atol=1e-10)
    assert m.n == len(x)


def test_moments_are_float64():
    assert Moments(torch.rand(5, 2)).cov.dtype == torch.float64


# ------------------------------------------------------------------ Frechet
@given(seeds)
@some
def test_frechet_zero_symmetric_and_moves_with_the_axes(seed):
    x, y = skewed(40, 6, seed), skewed(50, 6, seed + 1)*1.5 + .4
    a, b = Moments(x), Moments(y)
    d, size = frechet_distance(a, b), (a.cov.trace() + b.cov.trace()).item()
    assert 0 <= frechet_distance(a, a) < 1e-9*size
    assert math.isclose(d, frechet_distance(b, a), rel_tol=1e-8) and d > 1e-3
    q = torch.linalg.qr(normal(6, 6, seed=seed)).Q
    shift = 3*normal(6, seed=seed + 2)
    assert math.isclose(d, frechet_distance(Moments(x @ q + shift), Moments(y @ q + shift)), rel_tol=1e-7)
    assert math.isclose(9*d, frechet_distance(Moments(3*x), Moments(3*y)), rel_tol=1e-8)


@given(seeds, st.integers(1, 12))
@some
def test_frechet_equals_scipy(seed, d):
    x, y = skewed(60, d, seed), 2*skewed(80, d, seed + 1) - 1
    a, b = Moments(x), Moments(y)
    root = scipy.linalg.sqrtm((a.cov @ b.cov).numpy())
    theirs = (a.mean - b.mean).square().sum().item() + (a.cov + b.cov).trace().item() - 2*root.trace().real
    assert math.isclose(frechet_distance(a, b), theirs, rel_tol=1e-6)


@given(seeds, st.integers(1, 8))
@some
def test_frechet_of_two_gaussians(seed, d):
    "Diagonal covariances: squared distance of the means and of the standard deviations."
    m, v = normal(2, d, seed=seed), normal(2, d, seed=seed + 1).abs() + .1
    got = frechet_distance(*(moments_of(m[i], v[i].square().diag(), 100) for i in (0, 1)))
    assert math.isclose(got, ((m[0] - m[1])**2 + (v[0] - v[1])**2).sum().item(), rel_tol=1e-9)


def test_frechet_survives_a_dead_feature():
    "A feature that never varies makes the covariance singular; nothing becomes complex or NaN."
    x = skewed(50, 4)
    x[:, 2] = 1.
    y = x + torch.tensor([0., 0, 5, 0])
    assert math.isclose(frechet_distance(Moments(x), Moments(y)), 25., rel_tol=1e-9)


# ------------------------------------------------------------------ kernel distance
def test_kernel_distance_equals_scikit_learn():
    x, y = skewed(30, 5), skewed(40, 5, 9) + .3
    k = lambda a, b: polynomial_kernel(a.numpy(), b.numpy(), degree=3, coef0=1)     # gamma is 1/features
    xx, yy, xy = k(x, x), k(y, y), k(x, y)
    theirs = (xx.sum() - xx.trace())/(30*29) + (yy.sum() - yy.trace())/(40*39) - 2*xy.mean()
    assert math.isclose(kernel_distance(x, y), theirs, rel_tol=1e-9)
    assert math.isclose(kernel_distance(x, y), kernel_distance(y, x), rel_tol=1e-9)


def test_kernel_sums_in_parts():
    x, y, w = normal(23, 3), normal(17, 3, seed=1), torch.rand(23, 2, dtype=torch.float64)
    ones = torch.ones(17, 2, dtype=torch.float64)
    torch.testing.assert_close(kernel_sums(x, y, w, ones, rows=5), kernel_sums(x, y, w, ones))


def test_kernel_distance_has_no_bias():
    "400 pairs of sets of 10 of one kind: the mean is within 4 standard errors of 0, and a third or more are below."
    found = torch.tensor([kernel_distance(normal(10, 4, seed=i), normal(10, 4, seed=10_000 + i)) for i in range(400)])
    assert abs(found.mean()) < 4*found.std()/20 and (found < 0).double().mean() > 1/3


# ------------------------------------------------------------------ torchmetrics
class Given(torch.nn.Module):
    "A feature network for torchmetrics: pixels are the features."
    num_features = 16
    def forward(self, x): return x.flatten(1)


def as_pictures(x): return x.view(-1, 1, 4, 4)


def both_sets(): return skewed(300, 16), 1.2*skewed(200, 16, 9) + .3


def test_frechet_equals_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance
    x, y = both_sets()
    fid = FrechetInceptionDistance(feature=Given(), input_img_size=(1, 4, 4), normalize=True).set_dtype(torch.float64)
    for part in x.split(90): fid.update(as_pictures(part), real=False)
    fid.update(as_pictures(y), real=True)
    assert math.isclose(frechet_distance(Moments(x), Moments(y)), fid.compute().item(), rel_tol=1e-4)


def test_kernel_distance_equals_torchmetrics():
    "One subset that is the whole: torchmetrics then takes every pair."
    from torchmetrics.image.kid import KernelInceptionDistance
    x, y = (o[:200] for o in both_sets())
    kid = KernelInceptionDistance(feature=Given(), subsets=1, subset_size=200, normalize=True)
    kid.update(as_pictures(x), real=False)
    kid.update(as_pictures(y), real=True)
    assert math.isclose(kernel_distance(x, y), kid.compute()[0].item(), rel_tol=1e-4)


# ------------------------------------------------------------------ precision and recall
@given(seeds, st.integers(1, 4))
@some
def test_precision_recall_equals_scikit_learn(seed, k):
    x, y = normal(40, 3, seed=seed), .7*normal(30, 3, seed=seed + 1) + .2
    def share(points, centres):
        r = torch.tensor(NearestNeighbors(n_neighbors=k + 1).fit(centres).kneighbors(centres)[0][:, -1])
        return ((points[:, None] - centres).norm(dim=-1) <= r).any(1).double().mean().item()
    torch.testing.assert_close(precision_recall(x, y, k), (share(x, y), share(y, x)))


def test_precision_recall_at_the_ends():
    x = normal(50, 4)
    assert precision_recall(x, x) == (1., 1.) and precision_recall(x, x + 100) == (0., 0.)
    p, r = precision_recall(x[x.norm(dim=1).argsort()[:12]], x)     # the twelve in the middle: all inside, covering little
    assert p == 1 and r < .7


def test_neighbours_in_parts():
    x, y = normal(23, 3), normal(17, 3, seed=1)
    r, w = radii(y, 2), torch.ones(17, 1)
    assert torch.equal(radii(y, 2, rows=4), r) and torch.equal(covered(x, y, r, w, rows=6), covered(x, y, r, w))


# ------------------------------------------------------------------ histogram and patches
def test_histogram():
    shares = class_histogram(torch.eye(4)[[0, 0, 1, 3]])
    assert shares.tolist() == [.5, .25, 0, .25] and unevenness(shares) == .25
    assert unevenness(torch.tensor([1., 0, 0, 0])) == .75 and unevenness(torch.full((4,), .25)) == 0


def test_patches():
    x = torch.rand(3, 2, 28, 28, generator=torch.Generator().manual_seed(0))*2 - 1
    tiles = x.double().unfold(2, 4, 4).unfold(3, 4, 4)
    want = torch.cat([tiles.mean((-1, -2)).flatten(1), tiles.std((-1, -2), correction=0).flatten(1)], 1)
    torch.testing.assert_close(patch_features(x), want)
    flat = patch_features(torch.full((1, 1, 8, 8), -.5))
    assert (flat[:, :49] == -.5).all() and (flat[:, 49:] == 0).all()
    with pytest.raises(ValueError, match="wanted at least 7 pixels a side"): patch_features(torch.zeros(1, 1, 28, 6))


# ------------------------------------------------------------------ what ships; accuracy
def test_shipped_moments_fit_the_embedded_images():
    "The embedded test images are a fifth of the 10,000: their patches have the whole's means within 4 standard errors."
    whole, part = shipped_moments("test", "patches"), patch_features(load_fashion("test")[0])
    assert whole.n == 10_000 and shipped_moments("train", "features").n == 60_000
    error = (part.mean(0) - whole.mean).abs()/(whole.cov.diagonal()/2000).sqrt().clamp(min=1e-9)
    assert error[whole.cov.diagonal() > 1e-6].max() < 4.5
    with pytest.raises(ValueError, match="part, view: got 'dev', 'features'"): shipped_moments("dev", "features")


def test_as_saved():
    x = torch.tensor([-1.2, -1, 0, .001, 1.7]).view(1, 1, 1, 5)
    got = as_saved(x)
    assert got.flatten()[[0, 1, 4]].tolist() == [-1, -1, 1] and (got - x.clamp(-1, 1)).abs().max() <= 1/255 + 1e-6
    assert torch.equal(as_saved(got), got)


def test_accuracy_score():
    "Digits: names given at random teach nothing."
    x, y = load_digits_images()
    x, y, unseen = x[:1200], y[:1200], (x[1200:], y[1200:])
    options = dict(passes=3600, width=(8, 16, 32), augment=lambda x, g: x, batch_size=32, precision="fp32")
    right = classification_accuracy_score(x, y, *unseen, **options)
    wrong = classification_accuracy_score(x, y[torch.randperm(1200, generator=torch.Generator().manual_seed(0))], *unseen, **options)
    assert right > .7 and wrong < .35, (right, wrong)


# ------------------------------------------------------------------ bad input
NAN = torch.ones(9, 3)
NAN[4, 1] = float("nan")

@pytest.mark.parametrize("x, message", [
    (NAN, "got NaN or infinite values in 1 of 9 rows"), (torch.ones(0, 3), r"got shape \(0, 3\)"), (torch.ones(3), r"got shape \(3,\)"),
    ([1, 2], "got list")])
def test_bad_features(x, message):
    for f in (Moments, lambda x: kernel_distance(x, torch.ones(9, 3)), lambda x: precision_recall(torch.ones(9, 3), x), class_histogram):
        with pytest.raises(ValueError, match=message): f(x)


def test_bad_pairs():
    few, many = Moments(normal(5, 8)), Moments(normal(50, 8))
    with pytest.raises(ValueError, match="a: got 5 images for 8 features, wanted at least 9"): frechet_distance(few, many)
    with pytest.raises(ValueError, match="b: got 5 images"): frechet_distance(many, few)
    with pytest.raises(ValueError, match="a: got no images"): frechet_distance(Moments(), many)
    with pytest.raises(ValueError, match="got 8 and 7 features"): frechet_distance(many, Moments(normal(50, 7)))
    with pytest.raises(ValueError, match="features: got width 7, wanted 8"): Moments(normal(5, 8)).update(normal(5, 7))
    with pytest.raises(ValueError, match="got 8 and 7 features"): kernel_distance(normal(5, 8), normal(5, 7))
    with pytest.raises(ValueError, match="got 1 and 5 images, wanted at least 2"): kernel_distance(normal(1, 8), normal(5, 8))
    with pytest.raises(ValueError, match="k: got 0"): precision_recall(normal(5, 8), normal(5, 8), 0)
    with pytest.raises(ValueError, match="wanted at least 6 of each"): precision_recall(normal(5, 8), normal(50, 8), 5)
