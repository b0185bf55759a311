# after block 1
assert rank(stack) == 12
torch.testing.assert_close(recovered, z)  # for any z
assert rank(many) == 12 < many.shape[1]
torch.testing.assert_close(many @ (signals + silent), many @ signals)  # no reader can distinguish them, linear or not
assert other > 0.1
