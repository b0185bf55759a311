# after block 1
assert 0.1 < lean < 0.3
assert abs(slope(total) - 2) < 0.1
assert abs(slope(error) - 1) < 0.1  # squared: the error itself grows as the root of n
assert abs(slope(coherent) - 2) < 0.1  # directions that lean, and amplitudes that are never negative
assert abs(slope(centred) - 1) < 0.15
