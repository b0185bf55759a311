# after block 1
torch.testing.assert_close(change, share[writers.index("embed"), first == 2].sum())

# after block 2
assert not any("bias" in row["writer"] for row in centred.rows())
assert persistence.stamp["error"] < 1e-6  # the last state is the sum of all that was written
