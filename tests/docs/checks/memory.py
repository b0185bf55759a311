# after block 1
assert record["class"][place] == "weakening"
torch.testing.assert_close(record["cosine"][place].item(), -1.0)
torch.testing.assert_close(record["gain"][place].item(), 1.0)

# after block 2
assert counts["weakening"] + counts["between"] + counts["strengthening"] == counts["count"] == 120
assert counts["null"]["mean_square"] == 1 / 24
assert 0 < counts["null"]["weakening"] < 2

# after block 3
torch.testing.assert_close(heads["token_copying"][place], tokens.real.sum() / tokens.abs().sum())
assert abs(heads.stamp["null"]["copying"]["mean"]) < 0.5

# after block 4
torch.testing.assert_close(update @ directions[:, 0], values[0] * directions[:, 0])

# after block 5
torch.testing.assert_close(record["erasure"][j, i], -(O.T @ T @ O).trace() / O.square().sum())
assert record["erasure"][record.axis("reader").index("L0H0"), i].isnan()  # too early
