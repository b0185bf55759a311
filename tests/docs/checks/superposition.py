# after block 1
assert abs(figures["largest"] - float(cosines.max())) < 1e-6
assert figures["largest"] > figures["welch"] == welch(120, 24)
assert int(record["count"].sum()) == 120 * 119 // 2

# after block 2
assert counts.published == 9216
assert counts.active_signals == 37
assert counts.welch is None  # 0.25 > 1/sqrt(576)
assert round(counts.log10_random_code, 1) == 4.0
assert 10**larger.log10_random_code > larger.published  # exponential overtakes linear

# after block 3
assert abs(power["total"]["exponent"] - power["total"]["random"]) < 0.2
assert power["error"]["low"] < power["error"]["exponent"] < power["error"]["high"]
assert float(growth["random_error"][index]) == 63 / 24  # (n - 1) / d: more noise than signal

# after block 4
assert curves["matched"][0] == curves["known_support"][0] == 1  # one signal is always found
assert curves["matched"][-1] < 0.7  # sixteen in 24 dimensions are not
assert curves["known_support"][-1] > 0.95  # given which ones are active
