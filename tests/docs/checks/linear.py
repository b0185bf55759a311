# after block 1
torch.testing.assert_close(replay(stream, point), residual["final"], rtol=1e-4, atol=1e-4)  # its norms are in float32
torch.testing.assert_close(once + second.linear(once), together)
torch.testing.assert_close(first.apply(x), x + first.linear(x) + first.constant)
assert first.at(2).shape == (24, 24)  # token 2 to itself; first.between(2, 0) from token 0

# after block 2
assert last["composition"]["rank"] == last["composition"]["certified_rank"] == 24
assert last["path"]["rank"] <= record["rank"][0].min() <= 8  # two heads' width of values: the least of all blocks
assert record.stamp["over"] == "token 3 to itself"
assert vw.LinearComposition()(stream).stamp["point"] == "convention"

# after block 3
assert set(some.axis("path").labels) < set(every.axis("path").labels)
assert len(every.axis("path").labels) == (1 + 1) * (1 + 6) * (1 + 1)  # L0.mlp, six heads of layer 1, L1.mlp
torch.testing.assert_close(every["share"].sum().item(), 1.0)
assert abs(every.stamp["totals"]["remainder_share"]) < 1e-9

# after block 4
assert discrepancy(stream, "L0H1", "L1H3", "L2H2.K") > 0.1
