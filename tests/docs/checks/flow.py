# after block 1
assert flow["contribution"].shape == (18, len(flow.axis("writer").labels))
assert flow.top(1)["writer"]  # the edge that carries most

# after block 2
assert again.identity == moments.identity
