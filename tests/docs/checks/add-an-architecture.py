# after block 1
assert row.groups(2) == ["L0.attn", "L1.attn"]
assert stored_shape(row.layout, axes) == (8, 24)

# after block 2
from exactness import errors
from tiny_models import flow

assert max(errors(stream, flow(model, tokens), tokens).values()) < 1e-6

# after block 3
assert stored_shape(gpt2, square) == stored_shape(llama, square) == (24, 24)
assert not torch.equal(as_gpt2, as_llama)

# after block 4
assert stored_shape(blocks, axes) == stored_shape(interleaved, axes) == (72, 24)

# after block 5
torch.testing.assert_close(right[0].T @ right[1], wrong[0].T @ wrong[1])
assert not torch.allclose(right[0].T @ turn.T @ right[1], wrong[0].T @ turn.T @ wrong[1])

# after block 6
import pytest

with pytest.raises(vw.VirtualWeightsError, match="gate_proj"):
    resolve({**config, "intermediate_size": 48}, shapes, "hf")
