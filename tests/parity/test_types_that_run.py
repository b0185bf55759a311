"""Every model type that opens and runs: hooks see what the maps say, blocks frozen at a prompt give its last state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conformance.checkpoints import build, flavours
from conformance.checkpoints import model_types as conformance_types

import virtual_weights as vw
from virtual_weights.analysis.depth.frozen import replay
from virtual_weights.architecture import model_types
from virtual_weights.errors import ArchitectureError, UsageError
from virtual_weights.runtime import Run
from virtual_weights.runtime.edges.attribution import Attribution
from virtual_weights.runtime.edges.edge import Edge, Removal, removed
from virtual_weights.runtime.edges.losses import next_token_loss
from virtual_weights.runtime.flow.observation import operating_point
from virtual_weights.runtime.running.activations import prompted
from virtual_weights.stream import through_norm

NOT_RUN = {"opt": ArchitectureError, "granite_swa": UsageError}
KINDS = (
    "gemma2",
    "gemma3_text",
    "olmo2",
    "qwen3",
    "glm4",
    "cohere2",
    "granite",
    "bitnet",
    "hunyuan_v1_dense",
    "falcon",
)
"""Norms after parts, before and after; on queries and keys, before and after rotary; one norm for two; none before."""


def opened(model_type: str, folder: Path, dtype: torch.dtype = torch.float64) -> Run:
    build(model_type, flavours(model_type)[0], folder)
    tokens = torch.randint(0, 90, (3, 8), generator=torch.Generator().manual_seed(0))
    return Run.on_tokens(vw.open(folder).to(dtype), tokens, dtype=dtype)


@pytest.mark.parametrize("model_type", sorted(set(model_types()) & set(conformance_types()) - NOT_RUN.keys()))
def test_it_runs_and_is_what_its_maps_say(model_type: str, tmp_path: Path) -> None:
    assert opened(model_type, tmp_path, torch.float32).runner.exactness_error < 1e-5


@pytest.mark.parametrize("model_type", NOT_RUN)
def test_what_is_not_run_says_why(model_type: str, tmp_path: Path) -> None:
    with pytest.raises(NOT_RUN[model_type], match=r"not run here|sinks"):
        _ = opened(model_type, tmp_path).module


@pytest.mark.parametrize("model_type", KINDS)
def test_frozen_blocks_give_the_last_state(model_type: str, tmp_path: Path) -> None:
    run = opened(model_type, tmp_path).prompt()
    x = replay(run.stream, operating_point(run))
    expected = prompted(run).state(run.stream.states - 1)
    assert float((through_norm(run.stream, x) - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("model_type", KINDS)
def test_removing_a_little_of_an_edge_does_what_attribution_says(model_type: str, tmp_path: Path) -> None:
    run, little = opened(model_type, tmp_path), 0.03  # norms of transformers round to float32
    tokens = run.sequences()
    for port in ("Q", "K", "V"):
        told = Attribution(port)(run)
        name = "L2H1." + port
        for writer in ("L0H2", "L1H3"):
            edge = Edge.of(run.stream, writer, name)
            losses: list[float] = []
            for fraction in (little, -little):
                with torch.no_grad(), removed(run.module, run.stream, [edge], Removal(fraction=fraction)):
                    losses.append(float(next_token_loss(run.module(tokens).logits, tokens).mean()))
            share = (losses[0] - losses[1]) / (2 * little)
            expected = told["attribution"][
                told.axis("reader").labels.index(name), told.axis("writer").labels.index(writer)
            ]
            assert share == pytest.approx(float(expected), rel=0.03, abs=2e-5)
