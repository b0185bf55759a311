# after block 1
assert vw.open(model).read("K", "L1.attn").maps.equal(stream.read("K", "L1.attn").maps)
