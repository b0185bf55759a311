# after block 1
assert rank(torch.cat(direct, 1)) == sum(dims) <= d  # independent: the bound holds
assert rank(one_more) == d < sum(dims) + 1  # past d no subspaces are independent
assert pairs == [2, 2, 2]  # each two independent
assert rank(lines) == 2 < 3  # all three not
assert same.shape[1] <= 3  # the bound is met, and yet they are not independent
assert rank(same) < same.shape[1]

# after block 2
assert rank(many) == 7 < len(many)
assert abs(coherence - 1 / 3) < 1e-12
assert found.tolist() == list(range(28))
torch.testing.assert_close(responses.diagonal(), amplitudes)  # with its amplitude
assert (kernel @ many).norm() < 1e-12
assert len(kernel) == 21  # all at once: 21 combinations are not seen at all
