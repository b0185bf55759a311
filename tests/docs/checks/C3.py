# after block 1
assert abs(edge / 2 - 1) < 0.1
assert torch.linalg.matrix_rank(noisy) == n  # nothing is zero
assert count(noisy, edge) == r  # five clearly stand out, for 5 > 2 edge
assert count(noisy, edge / 2) > r  # otherwise it depends on the threshold
assert count(noisy, 2 * edge) == r
assert count(noisy, 4 * edge) == 0
assert count(weak, edge) < r  # too weak for this noise: missed

# after block 2
for v in (noisy, noise, falling):
    assert spread(v) == sorted(spread(v))
    assert spread(v)[0] < spread(v)[3] - 1
torch.testing.assert_close(spread(signal(5.0)), [5.0] * 4)  # equal gains: all the same
assert spread(noisy)[2] > 2 * r  # with noise not the rank of the signal
