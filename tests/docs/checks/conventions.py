# after block 10
assert edges.parameters == {"port": "K", "rotary_offset": None, "writers": "heads", "compute_dtype": "float64"}
assert set(edges.stamp) >= {"norm", "rotary_offset", "gauge", "compute_dtype"}
assert set(edges.provenance) >= {"model", "fingerprint", "family"}

# after block 11
assert list(edges) == list(edges.rows())
assert edges["L0H1", "L1H3.K"] == edges["L1H3.K", "L0H1"] == edges["L0H1", "L1H3"]
assert {"score", ("L0H1", "L1H3.K")} <= set(edges._ipython_key_completions_())

# after block 12
assert table.height == len(edges)
assert frame.attrs["stamp"] == edges.stamp

# after block 13
torch.testing.assert_close(again["score"], edges["score"], rtol=0, atol=0, equal_nan=True)
assert again.axes == edges.axes
assert again.column("score").unit == edges.column("score").unit
