# after block 1
assert (nearest["written", "unembed"][0], nearest["read", "embed"][0]) == (5, 3)
torch.testing.assert_close([nearest["written", "unembed"][1], nearest["read", "embed"][1]], [1.0, 1.0])

# after block 2
torch.testing.assert_close(circuits["ov"][1], vw.Circuit("L0H1.ov")(stream)["gain"])
assert 1 < effective < 4
assert row["token"] == alone["token"]
torch.testing.assert_close(row["cosine"], alone["cosine"])

# after block 3
torch.testing.assert_close(float(angles["cosine"].square().mean()), pair["overlap"])
torch.testing.assert_close(float(angles["cosine"][0]), pair["cosine"])
assert len(angles["cosine"]) == 4

# after block 4
torch.testing.assert_close(record["strength"].square().sum(), whole.square().sum())
assert all_readers.axis("reader").labels[:2] == ("L1H0.K", "L1H1.K")
assert all_readers.top(3, "z")["z"].shape == (3,)

# after block 5
assert (first["kind"], first["reader"]) == ("neuron", "L1N5.up")
torch.testing.assert_close(first["strength"], float(vector.values.norm()) ** 2)

# after block 6
torch.testing.assert_close(profile["strength"][5], strength)
assert profile.stamp["rotary_offset"] == list(range(8))
torch.testing.assert_close(mean_qk(stream, "L1H2", range(8)).dense(), mean)
assert 0 < vw.MeanCircuit("L1H2", range(8))(stream).stamp["kept"] < 1
