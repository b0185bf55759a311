# after block 1
assert (edge.kv_group, edge.shared_with) == ("L2.kv1", ("L2H3", "L2H5"))
assert changed[0] == 0  # the other key head gets what it got
assert changed[1] > 0

# after block 2
assert [row["kind"] for row in rows[:2]] == ["asked", "asked"]
assert {row["reader"] for row in rows if row["writer"].endswith("mlp")} == {"unembed"}
assert rows[0]["pattern_change"] > 0
assert rows[1]["pattern_change"] is None

# after block 3
quantities = {row["quantity"]: row["value"] for row in circuit.rows()}
assert abs(quantities["removed"] - quantities["sum_of_singles"] - quantities["interaction"]) < 1e-9

# after block 4
assert abs(float(change.nanmean()) - by_token.stamp["effect_nats"]) < 1e-6
assert abs(by_token.stamp["effect_nats"] - rows[1]["effect_nats"]) < 1e-6

# after block 5
assert pairs.partners[0].tolist() == corrupted[0]

# after block 6
assert abs((ends[0] - ends[1]) / (2 * step) - best["attribution"]) < 0.02 * abs(best["attribution"])

# after block 7
assert abs(change - row["attribution"]) < 1e-4

# after block 8
assert record.stamp["error"] < 1e-4
assert abs(float(record["logit"].sum()) - whole["logit"]) < 1e-4
