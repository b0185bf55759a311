# after block 1
from itertools import pairwise

shares, frontier = [], []
for price, m in best.items():
    assert float(corrected(m, price)) >= others[price]  # no policy does better
    assert float(written(torch.zeros(n), price)) >= float(written(policies, price).max())  # as written: keep all
    shares.append(1 - float(m.mean()))
    frontier.append((float(((1 - m) * utility).mean()), float(((1 - m) * interference).mean())))
assert shares[0] == 1
assert shares == sorted(shares, reverse=True)
assert shares[-1] < 0.1  # the price decides what is kept
for (more, dear), (less, cheap) in pairwise(frontier):
    assert more > less
    assert dear > cheap
rates = [(a - c) / (b - d) for (a, b), (c, d) in pairwise(frontier)]
assert rates == sorted(rates)  # concave: the less is kept, the more utility a unit of interference is worth
assert float(corrected(best[0.5], 0.5)) > float(corrected(scrambled, 0.5)) + 0.05
