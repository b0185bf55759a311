# after block 1
assert len(lines) == 120 > d / eps**2
assert abs(eps - 0.5) < 1e-12
torch.testing.assert_close(other, torch.full_like(other, 120 / d - 1))  # the least there can be
assert other.min() > eps**2
assert abs(1 + eps**2 * d - 3) < 1e-9  # so many at once along random directions

# after block 2
assert coherence(many) < 0.5
assert len(many) > 200 / 0.5**2  # nothing special about E_8
assert torch.linalg.matrix_rank(threes) == 7
assert abs(coherence(threes) - welch(28, 7)) < 1e-12  # attain Welch's bound
assert coherence(lines) > welch(120, 8)
assert coherence(many) > welch(1000, 200)
