# after block 1
for r in (2, 5, 9):
    assert dimension(9, 12, r) == r * (9 + 12 - r)
assert dimension(9, 12, 9) == 9 * 12  # no bottleneck: nothing is saved
assert round(saving(100, 100, 1), 2) == 50.25
assert [layer for layer, n in least.items() if n >= 100] == [25]
