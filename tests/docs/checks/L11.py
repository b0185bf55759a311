# after block 1
assert abs(cosine(out) + 1) < 1e-12  # all of them equally efficient
for gain, share in ((0.3, 0.7), (1.0, 0.0), (2.0, -1.0), (5.0, -4.0)):
    assert abs(shares[gain] - share) < 1e-12  # and only one of them clears
assert abs(left(clearing)) < 1e-12
assert cosine(clearing) > -0.9
assert float(clearing.norm()) > float(shortest.norm())  # longer than need be
assert float(w.norm()) > float(gains.max()) > 0 > float(gains.min())  # none of this length gains as much
