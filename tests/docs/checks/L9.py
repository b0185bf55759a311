# after block 1
assert m > 2 * d
assert mu < 0.35  # three times as many directions as dimensions
assert largest <= 4 * mu  # the bound
assert right  # few signals: every sign is right
assert seen  # and it is seen which
assert 0 < wrong  # many signals: the matched filter errs
torch.testing.assert_close(amplitudes, signs)  # a method that knows which are active does not

# after block 2
torch.testing.assert_close((both @ both.T).fill_diagonal_(0).abs().max(), torch.tensor(1 / 8).double())
assert recovered == 50  # 4 < (1 + 8) / 2
assert same
