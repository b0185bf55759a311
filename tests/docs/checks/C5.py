# after block 1
assert lower <= size(read @ write) <= upper
assert size(apart @ write) < 1e-12 < size(read @ write)
assert abs(float(even.norm()) ** 2 - 36 * float(cosines.square().sum())) < 1e-12  # angles decide

# after block 2
assert shared[0] > sixty[0]  # closer, and yet less interference
assert shared[1] < 1e-5 < sixty[1]
assert abs(mean - bound) < 1e-12  # the bound is attained
