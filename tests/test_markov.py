"Properties of the chain functions: closed forms, inverses, agreement of simulation and algebra, and bad input."
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from diffusion_book.markov import (distribution_after, from_levels, grey_walk, reverse_chain,
                                   simulate_chain, stationary, to_levels, total_variation, transition_matrix)

QUICK = settings(max_examples=40, deadline=None)


def rows(weights):
    "Positive weights to rows that add up to 1."
    w = torch.from_numpy(weights)
    return w/w.sum(-1, keepdim=True)


@st.composite
def chains(draw):
    "A transition matrix with all entries above zero, and chances over its states."
    n = draw(st.integers(1, 6))
    weight = st.floats(.01, 1)
    return rows(draw(arrays("float64", (n, n), elements=weight))), rows(draw(arrays("float64", n, elements=weight)))


@QUICK
@given(chains())
def test_transition_matrix_keeps_a_valid_table(chain):
    torch.testing.assert_close(transition_matrix(chain[0]), chain[0], atol=1e-14, rtol=0)


@QUICK
@given(chains(), st.integers(0, 6), st.integers(0, 6))
def test_distribution_after_adds_up_and_composes(chain, m, n):
    P, p = chain
    both = distribution_after(P, p, m + n)
    torch.testing.assert_close(both.sum(), torch.tensor(1., dtype=torch.float64))
    torch.testing.assert_close(distribution_after(P, distribution_after(P, p, m), n), both)


@QUICK
@given(chains())
def test_stationary_is_left_alone_and_is_the_limit(chain):
    P, p = chain
    pi = stationary(P)
    torch.testing.assert_close(pi @ P, pi, atol=1e-12, rtol=0)
    assert (pi >= -1e-12).all()
    torch.testing.assert_close(distribution_after(P, p, 3000), pi, atol=1e-6, rtol=0)   # every entry is at least 1/501


@pytest.mark.parametrize("a, b", [(.1, .2), (.5, .5), (.9, .3)])
def test_stationary_of_two_states(a, b):
    "Leaving with chances a and b: the stationary chances are b and a over their sum."
    wanted = torch.tensor([b, a], dtype=torch.float64)/(a + b)
    torch.testing.assert_close(stationary(torch.tensor([[1 - a, a], [b, 1 - b]])), wanted, atol=1e-6, rtol=0)


@QUICK
@given(chains())
def test_total_variation_never_grows(chain):
    P, p = chain
    d = [total_variation(distribution_after(P, p, n), stationary(P)) for n in range(4)]
    assert all(later <= earlier + 1e-12 for earlier, later in zip(d, d[1:]))


@QUICK
@given(chains())
def test_total_variation_is_the_largest_gap_of_an_event(chain):
    P, p = chain
    q, n = P[0], len(p)
    events = torch.tensor([[(e >> i) & 1 for i in range(n)] for e in range(2**n)], dtype=torch.float64)
    torch.testing.assert_close(total_variation(p, q), (events @ (p - q)).abs().max(), atol=1e-12, rtol=0)


@QUICK
@given(chains())
def test_reverse_is_bayes(chain):
    P, p = chain
    R = reverse_chain(P, p)
    later = p @ P
    torch.testing.assert_close(R.sum(1), torch.ones(len(p), dtype=torch.float64))
    torch.testing.assert_close(later @ R, p)                             # there and back
    torch.testing.assert_close((later[:, None]*R).T, p[:, None]*P)       # one joint distribution
    torch.testing.assert_close(reverse_chain(R, later), P)               # the reverse of the reverse


def test_reverse_of_unreached_states_is_still_a_table():
    R = reverse_chain(torch.eye(3), torch.tensor([.5, .5, 0]))
    torch.testing.assert_close(R[2], torch.tensor([.5, .5, 0], dtype=torch.float64))
    transition_matrix(R)


def test_stationary_reverse_of_a_symmetric_chain_is_the_chain():
    P = grey_walk(8)
    torch.testing.assert_close(reverse_chain(P, stationary(P)), P, atol=1e-10, rtol=0)


@pytest.mark.parametrize("levels, move", [(2, .5), (5, 1.), (16, 2/3), (32, .1)])
def test_grey_walk_closed_form(levels, move):
    P = grey_walk(levels, move)
    k = torch.arange(levels, dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.eigvalsh(P).flip(0), 1 - move*(1 - torch.cos(torch.pi*k/levels)))
    torch.testing.assert_close(P, P.T)
    assert (P >= 0).all() and torch.allclose(P.sum(1), torch.ones(levels, dtype=torch.float64))
    assert (P.diagonal()[1:-1] - (1 - move)).abs().max() < 1e-12 if levels > 2 else True


def test_simulation_agrees_with_the_matrix_power():
    "200,000 runs, every share within four standard errors."
    P, n = transition_matrix([[.1, .6, .3], [.5, .25, .25], [.3, .3, .4]]), 200_000
    end = simulate_chain(P, torch.full((n,), 2), 5, torch.Generator().manual_seed(0))[-1]
    exact = distribution_after(P, [0., 0, 1], 5)
    share = torch.bincount(end, minlength=3)/n
    assert ((share - exact).abs() < 4*(exact*(1 - exact)/n).sqrt()).all()


def test_simulation_shapes_seeds_and_certain_moves():
    P = torch.tensor([[0., 1], [1, 0]])
    start = torch.tensor([[0, 1, 0]])
    path = simulate_chain(P, start, 3)
    assert path.shape == (4, 1, 3) and path.dtype == torch.int64
    assert (path[1] == 1 - start).all() and (path[2] == start).all()
    assert simulate_chain(P, 1, 0).tolist() == [1]
    runs = [simulate_chain(grey_walk(4), torch.zeros(50, dtype=torch.long), 9, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert (runs[0] == runs[1]).all() and (runs[0] != runs[2]).any()


def test_simulation_never_makes_an_impossible_move():
    P = transition_matrix([[0, .5, .5, 0], [0, 0, 1, 0], [.5, 0, 0, .5], [1, 0, 0, 0]])
    path = simulate_chain(P, torch.zeros(2000, dtype=torch.long), 50, torch.Generator().manual_seed(0))
    assert (P[path[:-1], path[1:]] > 0).all()


@QUICK
@given(st.integers(2, 64))
def test_levels_round_trip(levels):
    k = torch.arange(levels)
    assert (to_levels(from_levels(k, levels), levels) == k).all()
    assert from_levels(k, levels)[[0, -1]].tolist() == [-1, 1]


BAD = [
    (lambda: transition_matrix([[.5, .4], [.5, .5]]), ValueError, "row 0"),
    (lambda: transition_matrix([[.5, .5], [float("nan"), .5]]), ValueError, "row 1"),
    (lambda: transition_matrix([[1.5, -.5], [.5, .5]]), ValueError, "row 0"),
    (lambda: transition_matrix([[.5, .5]]), ValueError, "square"),
    (lambda: simulate_chain(torch.eye(2), 2, 1), ValueError, "start"),
    (lambda: simulate_chain(torch.eye(2), -1, 1), ValueError, "start"),
    (lambda: simulate_chain(torch.eye(2), .5, 1), TypeError, "start"),
    (lambda: simulate_chain(torch.eye(2), 0, -1), ValueError, "n_steps"),
    (lambda: distribution_after(torch.eye(2), [1., 0, 0], 1), ValueError, "p0"),
    (lambda: distribution_after(torch.eye(2), [.7, .7], 1), ValueError, "p0"),
    (lambda: distribution_after(torch.eye(2), [1., 0], -1), ValueError, "n:"),
    (lambda: stationary(torch.eye(2)), ValueError, "2 eigenvalues"),
    (lambda: total_variation([1.], [.5, .5]), ValueError, "last axis"),
    (lambda: reverse_chain(torch.eye(2), torch.eye(2)), ValueError, "p:"),
    (lambda: reverse_chain(torch.eye(2), [.5, .6]), ValueError, "p:"),
    (lambda: grey_walk(1), ValueError, "levels"),
    (lambda: grey_walk(4, 1.1), ValueError, "move"),
    (lambda: to_levels(torch.tensor([0., 255.])), ValueError, "255"),
    (lambda: from_levels(torch.tensor([16])), ValueError, "k:"),
]


@pytest.mark.parametrize("call, error, words", BAD)
def test_bad_input_says_what_came(call, error, words):
    with pytest.raises(error, match=words): call()
