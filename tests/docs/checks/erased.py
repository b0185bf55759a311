# after block 1
assert len(record.axis("eraser").labels) == 3 * (4 + 1 + 96)  # heads, MLP and neurons of three layers
assert record["tokens"].max() == 64
torch.testing.assert_close(halves["bimodality"], record["bimodality"], rtol=1e-3, atol=1e-4, equal_nan=True)
assert halves.stamp["run"] == record.stamp["run"]  # how many chunks run at once changes no answer

# after block 2
assert (row["verdict"], row["erased"]) == ("conditional", 0.5)
assert abs(row["mean"] - 0.5) < 1e-3
assert row["bimodality"] > 0.99
