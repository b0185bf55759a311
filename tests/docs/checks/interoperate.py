# after block 1
assert record.stamp["error"] < 1e-5
assert model.config._attn_implementation == "sdpa"  # as it was
assert run.module.transformer.wte.weight is model.transformer.wte.weight  # what really ran: eager, on the same tensors

# after block 2
torch.testing.assert_close(query @ key.T, stream["L1H2"].qk.dense())

# after block 3
assert frame["score"].max() == edges["score"].nan_to_num().max().item()
