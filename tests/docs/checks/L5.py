# after block 1
assert apart > 0.5
assert len(paths) == 8
torch.testing.assert_close(read_k @ total @ out_i, summed)
assert float((read_k @ total @ out_i - direct).norm()) > 0.01  # the direct term alone is not the total
torch.testing.assert_close(read_k @ copy @ out_i, direct)
