# after block 1
for n in best:
    assert abs(best[n] - max(0.0, 1 - d / n)) < 1e-9  # none up to d; then the bound, attained
    assert matched[n] >= n / d - 1 - 1e-9
    assert n > d or matched[n] > best[n]
assert error(orthogonal.T, orthogonal) < 1e-20  # d signals, and nothing is lost

# after block 2
assert torch.equal(decode(x), signs)  # no trade-off, in exact arithmetic
assert wrong.tolist() == [0]  # noise of 2 hits the smallest
