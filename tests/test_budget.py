"The frontier: against its definition, pair by pair."
from hypothesis import given
from hypothesis import strategies as st

from diffusion_book.budget import frontier

points = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12)

@given(points)
def test_frontier_is_what_no_other_beats(points):
    kept = frontier(points)
    assert kept == sorted(kept) and set(kept) <= set(points)
    for p in set(points):
        beaten = any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)
        assert (p in kept) != beaten

def test_frontier_carries_the_rest_along():
    assert frontier([(2, 1., "b"), (1, 2., "a"), (3, 1., "c")]) == [(1, 2., "a"), (2, 1., "b")]
