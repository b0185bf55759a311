"""What every test shares: one thread per worker, and Hypothesis without a clock."""

from __future__ import annotations

import torch
from hypothesis import settings

torch.set_num_threads(1)  # two workers on two cores: more threads only wait for each other
settings.register_profile("patient", deadline=None, max_examples=25)
settings.load_profile("patient")
