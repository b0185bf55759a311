# after block 1
for write in (best, oblique):
    update = eye - write @ read
    assert (read @ update).norm() < 1e-11  # cleared: what it reads
    assert (update @ write).norm() < 1e-10  # and where it writes
    assert torch.linalg.svdvals(update)[d - k - 1] > 1 - 1e-12  # and nowhere near 0 as a whole
assert torch.linalg.matrix_norm(eye - best @ read, 2) < 1 + 1e-12 < torch.linalg.matrix_norm(update, 2)

# after block 2
for (gain, _), share in left.items():
    assert abs(share - (1 - gain)) < 1e-12
assert sorted(bool((w_in @ relu(y)).abs() < 1e-12) for y in (x, -x)) == [False, True]  # one sign only
assert kept(1.0).norm() < 1e-12
torch.testing.assert_close(kept(0.4), 0.6 * (states[1] - states[0]) @ frame)  # 0.6 is left, and the other comes in
