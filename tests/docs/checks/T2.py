# after block 1
assert rank(read @ write) == min(6, 4)  # in general position: the upper bound
assert rank(hidden) == 4
assert rank(read @ hidden) == 6 + 4 - 8  # Sylvester's bound, attained

# after block 2
assert factors == (2, 1)
assert by_own == 3  # each by its own largest: above the bound
assert by_factors <= min(factors)  # by the factors' sizes: never
