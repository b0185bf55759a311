# after block 1
torch.testing.assert_close(after, v)  # kept whole
assert float((later @ after).norm()) > 0.1
assert rank(eye + out @ value) == d  # nothing at all is lost by this layer
visible = torch.linalg.svd(value).Vh[0]
assert float((visible + erase @ visible).norm()) < 1e-12  # this is lost: eigenvalue -1
assert rank(eye + erase) == d - k
