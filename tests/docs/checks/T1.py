# after block 1
assert rank(second @ first) == 3  # one path keeps the bound
assert rank(composed) == d  # beside the stream it is broken
assert rank(composed - eye) == 3 + 5  # the update adds ranks up
assert rank(worst) == d - 3 - 5
