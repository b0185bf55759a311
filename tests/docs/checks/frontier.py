# after block 1
assert units.utility.shape == (22, 4 * 9)
last = units.writers.index("L2.mlp")
assert units.intended[last] == "unembed"
assert not units.interference[last].any()  # nothing else can read it
for price in (0.0, 0.5, 5.0):
    best = units.value(units.optimum(price), price)
    for other in (torch.zeros(22, 36), torch.ones(22, 36), units.erased, torch.rand(22, 36)):
        assert best >= units.value(other, price)

# after block 2
for row in frontier.rows():
    assert row["optimal"] >= max(row["keep_all"], row["erase_all"], row["model"], row["shuffled"])
assert first["lambda"] == 0
assert first["erased_by_optimal"] == (units.utility < 0).double().mean()
assert most["excess"] == most["erased_by_model"] - most["erased_by_optimal"]
