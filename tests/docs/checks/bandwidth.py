# after block 1
torch.testing.assert_close(record["written_entropy_rank"][1], torch.special.entr(p).sum().exp())
assert record["write_ranks"][:3].tolist() == [24, 24 + 6 * 4, 24 + 6 * 4 + 24]

# after block 2
assert hidden.rank == 1
torch.testing.assert_close(hidden.basis.abs(), torch.full((24, 1), 24**-0.5, dtype=torch.float64))
assert in_tokens(stream, row[:, None], count=1)[0][0].token == 5

# after block 3
assert (tightest["neurons_before"], tightest["neurons_after"]) == (40, 80)
assert abs(tightest["saving"] - 40 * 80 / (24 * (40 + 80 - 24))) < 1e-12

# after block 4
assert pair["second"] == "L1H0.K"
assert abs(pair["strength"] / torch.linalg.matrix_norm(qk @ ov, 2) - 1) < 1e-9
assert pair["strength"] <= pair["bound"] < torch.linalg.matrix_norm(qk, 2) * torch.linalg.matrix_norm(ov, 2)
