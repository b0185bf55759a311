# after block 1
torch.testing.assert_close(folded, before)
assert moved(in_place, before) > 0.1
assert moved(skewed, before) > 0.01
torch.testing.assert_close(longer, before)  # the multiples of orthogonal maps are all that keep the norm's direction

# after block 2
assert moved(layer(turn @ x), turn @ layer(x)) > 0.1  # LayerNorm knows the direction (1, ..., 1)
torch.testing.assert_close(layer(around @ x), around @ layer(x))
torch.testing.assert_close(reader @ turn.T @ rms(turn @ centre @ x), reader @ layer(x))
assert moved(post, turn @ write) > 0.1
torch.testing.assert_close(dense, turn @ write)
