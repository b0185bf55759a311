# after block 1
assert stream.d_model == 24
assert head.q.shape == head.k.shape == head.v.shape == (4, 24)
assert head.o.shape == (24, 4)
assert head.ov.shape == head.qk.shape == (24, 24)
torch.testing.assert_close(head.ov @ key, head.o @ (head.v @ key))
torch.testing.assert_close(query @ (head.qk @ key), score)

# after block 2
assert len(virtual.factors) == 4
assert svd.U.shape == svd.V.shape == (24, 4)
torch.testing.assert_close(svd.U @ svd.S.diag() @ svd.V.T, virtual.dense())
assert (svd.S[:-1] >= svd.S[1:]).all()

# after block 3
for name in ("L5H3", "L5H3.K", "L5.mlp", "L5.mlp.up", "L5N123.out", "L5.attn.bias", "embed", "pos", "unembed"):
    assert str(parse(name)) == name
assert str(parse("5.3.K")) == "L5H3.K"
assert stream["L2.mlp"].out.shape == (24, 40)
assert stream["L2N7.out"].shape == (24, 1)
assert stream["L2N7.up"].shape == (1, 24)
assert stream["embed"].shape == (24, 37)
assert stream["unembed"].shape == (37, 24)

# after block 4
import pytest

assert sequence["embed"] == (None, 0)
assert sequence["L1H4"] == (2, 3)
assert sequence["L1.mlp"] == (3, 4)
assert sequence["unembed"] == (6, None)
assert stream.states == 7
assert vw.virtual_weight(stream, "L1H4", "L1.mlp.up").shape == (40, 24)
assert side["L1H3"] == side["L1.mlp"] == (1, 2)
assert side["L1.attn.bias"] == (None, 2)
assert side["unembed"] == (3, None)
assert parallel.states == 4
with pytest.raises(vw.VirtualWeightsError, match="cannot reach"):
    vw.virtual_weight(parallel, "L1H3", "L1.mlp.in")

# after block 5
bare, unfolded = vw.open(model, fold=False), vw.open(gpt2, fold=False)
torch.testing.assert_close(stream["L1H4.K"].dense(), bare["L1H4.K"].dense() * bare.weight("norm", "L1.attn"))
torch.testing.assert_close(stream["L1H4.O"].dense(), bare["L1H4.O"].dense())
assert (stream.norm_stamp, bare.norm_stamp) == ("gain folded, unembedding centred", "left out")
assert layered.norm_stamp == "gain and centring folded, writers and unembedding centred"
P = torch.eye(24, dtype=torch.float64) - 1 / 24
gained = unfolded["L1H2.K"].dense() * unfolded.weight("norm", "L1.attn")
torch.testing.assert_close(layered["L1H2.K"].dense(), gained @ P)
for name in ("L1.attn", "L1.mlp", "L1.attn.bias", "embed", "pos"):
    torch.testing.assert_close(layered.write(name), P @ unfolded.write(name))
torch.testing.assert_close(layered["L1H2.O"].dense(), layered.write("L1.attn")[2])
assert torch.equal(layered["embed"].dense(), unfolded["embed"].dense())
for folded, plain in ((stream, bare), (layered, unfolded)):
    R, c = plain["unembed"].dense(), plain.weight("norm_bias", "unembed")
    gained = R * plain.weight("norm", "unembed") @ (P if c is not None else torch.eye(24, dtype=torch.float64))
    torch.testing.assert_close(folded.read("unembed").maps[0], gained - gained.mean(0))
    received = folded.read("unembed").constants
    assert received is None if c is None else torch.allclose(received[0], R @ c - (R @ c).mean())
shift, bias = layered.weight("norm_bias", "L1.attn"), layered.weight("k_bias", "L1.attn")[2]
torch.testing.assert_close(layered["L1H2"].k_constant, unfolded["L1H2.K"] @ shift + bias)

# after block 6
assert stream.read("Q", "L1.attn").maps.shape == (6, 4, 24)
assert stream.read("K", "L1.attn").maps.shape == (2, 4, 24)
assert [stream[f"L1H{i}"].kv_group for i in range(6)] == ["L1.kv0"] * 3 + ["L1.kv1"] * 3
readers = vw.Composition(port="K")(stream).axis("reader")
assert len(readers.labels) == 18
assert readers.labels[:2] == ("L0H0.K", "L0H1.K")
assert readers.groups[6:12] == ("L1.kv0",) * 3 + ("L1.kv1",) * 3
assert vw.Composition(port="Q")(stream).axis("reader").groups == ()
assert vw.Overlap(port="K")(stream).axis("reader").labels[:3] == ("L0H0.K", "L0H3.K", "L1H0.K")
assert parallel["L1H3"].kv_group is None

# after block 7
for m, n in ((9, 2), (5, 5), (30, 29)):
    turned = (stream.rotation(m) @ q) @ (stream.rotation(n) @ k)
    torch.testing.assert_close(turned, q @ stream.rotation(m - n).T @ k)
one, turn = torch.tensor(1.0, dtype=torch.float64), stream.rotation(1)
torch.testing.assert_close(turn[2, 0], one.sin())
torch.testing.assert_close(turn[0, 2], -one.sin())
torch.testing.assert_close(turn[1, 1], (one / 100).cos())
torch.testing.assert_close(head.qk_at(3).dense(), head.q.dense().T @ stream.rotation(3).T @ head.k.dense())
assert not torch.allclose(head.qk_at(3).dense(), head.qk.dense())
assert layered.rotation(3) is None
assert torch.equal(layered["L1H2"].qk_at(3).dense(), layered["L1H2"].qk.dense())
assert edges.stamp["rotary_offset"] == 0
assert vw.Composition(port="K", rotary_offset=3)(stream).stamp["rotary_offset"] == 3
assert vw.Composition(port="K")(layered).stamp["rotary_offset"] == "no rotary embedding"

# after block 8
assert half.weight("k", "L1.attn").dtype == torch.bfloat16
assert half.read("K", "L1.attn").maps.dtype == torch.float32
assert wide.read("K", "L1.attn").maps.dtype == torch.float64
assert (half["L1H4.K"] @ torch.zeros(24, dtype=torch.float64)).dtype == torch.float64
assert vw.svd(half["L1H4"].ov).S.dtype == torch.float64
assert vw.Composition(port="K")(half)["score"].dtype == torch.float64

# after block 9
assert stream.weight("k_bias", "L1.attn") is None
assert head.k_constant is None
assert layered["L1.mlp"].gate is None
assert score.shape == (18, 18)
assert score[6:12, 6:12].isnan().all()
assert score[6:12, :6].isfinite().all()
assert score[:6, 6:12].isnan().all()
assert sum(1 for _ in edges.rows()) == 3 * 36
assert len(edges.top(1000).axis("place").labels) == 3 * 36

# after block 10
assert edges.parameters == {"port": "K", "rotary_offset": None, "writers": "heads", "compute_dtype": "float32"}
assert set(edges.stamp) >= {"norm", "rotary_offset", "gauge", "compute_dtype"}
assert set(edges.provenance) >= {"model", "fingerprint", "family"}

# after block 11
assert list(edges) == list(edges.rows())
assert edges["L0H1", "L1H3.K"] == edges["L1H3.K", "L0H1"] == edges["L0H1", "L1H3"]
assert {"score", ("L0H1", "L1H3.K")} <= set(edges._ipython_key_completions_())

# after block 12
assert table.height == len(edges)
assert frame.attrs["stamp"] == edges.stamp

# after block 13
torch.testing.assert_close(again["score"], edges["score"], rtol=0, atol=0, equal_nan=True)
assert again.axes == edges.axes
assert again.column("score").unit == edges.column("score").unit

# after block 14
codes = {2: "UsageError", 3: "CheckpointError ArchitectureError RecordError OfflineError", 4: "UnsafeCheckpointError"}
for code, names in {**codes, 5: "ResourceError"}.items():
    assert all(getattr(errors, name).exit_code == code for name in names.split())
assert issubclass(errors.UnsafeCheckpointError, vw.VirtualWeightsError)
