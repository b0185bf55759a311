# after block 1
assert rank(heads[:3]) == 3 * k == d  # three of them: direct
assert rank(heads) == d < 5 * k  # all five: not
assert len(family) == 3
torch.testing.assert_close(restored, x)
silent = torch.linalg.svd(torch.cat(heads, 1)).Vh[-1]
assert float((torch.cat(heads, 1) @ silent).norm()) < 1e-12  # with five, 0 has a second way
assert ranks == [3, 3, 4]  # whoever takes the first can take no other, and there was a direct family of two
