# after block 1
assert (best["writer"], best["reader"]) == ("L0N3", "L2N7.up")
torch.testing.assert_close(best["score"], -1.0, rtol=0, atol=1e-6)
torch.testing.assert_close(best["strength"], direct, rtol=1e-6, atol=0)

# after block 2
assert into["writer"][0] == "L0N3"
assert into["rank"].tolist() == [1, 2, 3]
assert int(histogram["count"].sum()) == histogram.stamp["pairs"] == 3 * 40 * 40
assert histogram["count"][0] == 1  # the planted pair alone is below -0.99

# after block 3
torch.testing.assert_close(heads["strength"][n, h].double(), vector.norm(), rtol=1e-5, atol=0)
assert heads["score"][n, heads.axis("head").index("L2H0")].isnan()  # comes too late
assert vw.NeuronHead("K", reader="L2H1")(stream).top(1)["neuron"][0].startswith(("L0N", "L1N"))
