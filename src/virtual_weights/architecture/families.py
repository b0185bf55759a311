"""All tables, in one place."""

from __future__ import annotations

from virtual_weights.architecture.gpt2 import GPT2
from virtual_weights.architecture.llama import LLAMA, MISTRAL, QWEN2
from virtual_weights.architecture.neox import GPT_NEOX
from virtual_weights.architecture.table import Family

FAMILIES: tuple[Family, ...] = (LLAMA, MISTRAL, QWEN2, GPT2, GPT_NEOX)
