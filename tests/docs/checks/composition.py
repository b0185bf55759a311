# after block 1
assert abs(draws.mean() / mean - 1) < 0.03
assert abs(draws.var() / variance - 1) < 0.15

# after block 2
torch.testing.assert_close(torch.linalg.norm(qk @ ov) ** 2, gram)
torch.testing.assert_close(record["strength"][reader, writer], gram.sqrt())
torch.testing.assert_close(record["score"][reader, writer], gram.sqrt() / (qk.norm() * ov.norm()))
torch.testing.assert_close(record["null_ratio"], record["score"] * 24**0.5, equal_nan=True)

# after block 3
torch.testing.assert_close(before["strength"], after["strength"], equal_nan=True)
torch.testing.assert_close(before["score"], after["score"], equal_nan=True)
