# after block 1
assert moved(Turned(stream, turn)) < 1e-5  # transformers computes norms in float32
assert moved(Turned(stream, turn, fold=False)) > 1e-2  # the gains are still a basis
assert moved(Turned(stream, stretched)) > 1e-2  # invertible, but no rotation

# after block 2
assert planted["massive"][0]["coordinate"] == 7
assert record.top(1, by="write_energy")["coordinate"] == ("7",)
assert planted["write_kurtosis"] > 2 * plain["write_kurtosis"]
assert abs(planted["write_kurtosis_turned"] - planted["gaussian"]) < 1
