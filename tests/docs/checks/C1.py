# after block 1
torch.testing.assert_close(total, sum(paths))  # the direct path is one of four
torch.testing.assert_close(beside, virtual)  # it arrives all the same
assert alone.norm() < 1e-12 * virtual.norm()  # not so without the stream
assert erased.norm() < 1e-12 * virtual.norm()
assert virtual.norm() > 1  # which the virtual weight does not know
