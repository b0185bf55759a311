# after block 1
assert rank(both) == 2 * k  # they meet in 0 alone
assert size(read.T @ written) > 0.3
assert size(apart.T @ written) < 1e-12
assert size(oblique @ written) < 1e-12
assert size(oblique @ read - read) < 1e-12
assert abs(size(oblique) - 1 / sine) < 1e-12
assert size(oblique) > 1.05  # the price: a gain above 1
