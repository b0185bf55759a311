# after block 1
assert max(ratios) <= 1 + 1e-12  # a bound
assert max(ratios) > 1.3 * min(ratios)  # and no proportion
torch.testing.assert_close(exact, measured)
torch.testing.assert_close(torch.linalg.svdvals(strong), torch.linalg.svdvals(weak))  # same gains, same angles
assert size(strong @ write) == 3 * size(weak @ write) == 3  # and three times the interference
assert abs(size(narrow_read @ narrow_out) - bound) < 1e-9 * bound  # rank one: the bound is attained
