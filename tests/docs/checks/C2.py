# after block 1
assert intersection == 0  # as claimed: nothing
assert rank(reads.flatten(0, 1)) == 9  # in fact nine dimensions
torch.testing.assert_close(after[0], before[0])  # nobody reads it, through no path
torch.testing.assert_close(after[1], before[1] + unread)
assert changes[0] < 1e-12
assert changes[1] < 1e-12
assert changes[2] > 1  # read by one: communicated
