# after block 1
assert float(gains["a to 10 b"][0]) > 10 - 1e-9
assert float(moduli["a to 10 b"].max()) < 1e-6  # strong, and yet all eigenvalues are 0
assert float(moduli["random"].max()) <= float(gains["random"][0])
assert float(moduli["random"].sum()) < float(gains["random"].sum())
torch.testing.assert_close(rectangular @ vh[1], s[1] * u[:, 1])  # one channel: in, gain, out
torch.testing.assert_close(u.T @ (rectangular @ vh.T), torch.diag(s))  # and none of it in another channel
torch.testing.assert_close(moduli["symmetric"], gains["symmetric"])  # normal: both agree
