# after block 1
for content in (-2.0, 0.3, 5.0):
    x = other + content * u
    assert (u @ gated(x + z, switch)).abs() < 1e-12  # context there: cleared
    assert torch.equal(gated(x, switch), x)  # context not there: kept, to the last bit
assert effect(linear, z) < 1e-12  # in every context
assert effect(linear, other) < 1e-12
assert effect(lambda x: gated(x, switch), z) < 1e-12  # the gated one by context
assert abs(effect(lambda x: gated(x, switch), other) - 1) < 1e-12

# after block 2
assert abs(left[-20.0] - 1) < 1e-7  # off: kept
assert abs(left[2.0]) < 1e-12  # as calibrated: cleared
assert left[1.0] > 0.5  # weaker: mostly left
assert left[4.0] < -1  # twice as strong: turned round, and larger
assert abs(sizes[1.0]) < 1e-12
assert sizes[0.0] == float(u @ u)
assert sizes[1.1] < -0.9  # a tenth too much context: content turned round
