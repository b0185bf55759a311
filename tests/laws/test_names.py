"""The grammar of names: parse and format are inverse."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from virtual_weights.errors import UsageError
from virtual_weights.stream import Label, parse

NUMBERS = st.integers(0, 9999)
LABELS = st.one_of(
    st.builds(Label, st.just("head"), NUMBERS, NUMBERS, st.sampled_from([None, "Q", "K", "V", "O"])),
    st.builds(Label, st.just("mlp"), NUMBERS, st.none(), st.sampled_from([None, "in", "gate", "up", "out"])),
    st.builds(Label, st.just("neuron"), NUMBERS, NUMBERS, st.sampled_from([None, "in", "gate", "up", "out"])),
    st.builds(Label, st.sampled_from(["attn_bias", "mlp_bias"]), NUMBERS),
    st.builds(Label, st.sampled_from(["embed", "pos", "unembed"])),
)


@settings(deadline=None, max_examples=100)
@given(LABELS)
def test_parse_undoes_format(label: Label) -> None:
    assert parse(str(label)) == label


@pytest.mark.parametrize(("short", "long"), [("5.3", "L5H3"), ("5.3.K", "L5H3.K"), ("17.0.Q", "L17H0.Q")])
def test_short_spelling(short: str, long: str) -> None:
    assert str(parse(short)) == long


@pytest.mark.parametrize(
    "text", ["", "L5", "H3", "L5H3.X", "l5h3", "L5H3.K ", "L5.mlp.Q", "embed.K", "L-1H0", "L5H3\n", "5.3.k"]
)
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="names no component"):
        parse(text)
