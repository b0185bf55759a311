# after block 1
torch.testing.assert_close(y, one_map)
assert float((y - other_order).norm()) > 0.1  # the other order is another map
assert float((block(a + b) - block(a) - block(b)).norm()) > 0.1  # a block is not linear
torch.testing.assert_close(frozen @ x, block(x))
assert float((frozen @ a - block(a)).norm()) > 0.1
