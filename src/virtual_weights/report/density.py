"""46,080 neurons as counts: a two-dimensional histogram and the classes of each layer."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from virtual_weights.record import Record
from virtual_weights.report.tables import plain

BINS = (96, 72)
CLASSES = ("weakening", "between", "strengthening")
_LEAST_SHARE = 1e-4  # gains below this share of the largest are counted in the lowest row


def density(record: Record) -> dict[str, Any]:
    """A Neurons record, counted.

    Returns:
        ``counts``: cosine (rows, ascending) by log10 |gain| (columns, ascending), little-endian uint32 in base64;
        ``cosine`` and ``log_gain``, the ranges that the bins divide evenly; ``layers`` and ``classes``, a list a class
        with its count in every layer; ``threshold``, ``null``, ``classes_by``, ``absent``.
    """
    cosine, gain = (np.asarray(record[name], dtype=np.float64) for name in ("cosine", "gain"))
    there = ~np.isnan(cosine)
    cosine, size = cosine[there], np.abs(gain[there])
    threshold = float(record.parameters["threshold"])
    side = min(1.0, max(float(np.abs(cosine).max(initial=0.0)), threshold) * 1.04)
    largest = float(size.max(initial=0.0)) or 1.0
    lowest, highest = np.log10(largest * _LEAST_SHARE), np.log10(largest) + 0.04
    height = np.log10(np.maximum(size, largest * _LEAST_SHARE))
    counts, _, _ = np.histogram2d(cosine, height, BINS, [[-side, side], [lowest, highest]])
    layer = np.asarray(record["layer"])
    layers, classes = np.unique(layer), np.array([name or "" for name in record["class"]])
    return {
        "counts": base64.b64encode(counts.astype("<u4").tobytes()).decode(),
        "bins": list(BINS),
        "cosine": [-side, side],
        "log_gain": [float(lowest), float(highest)],
        "below": int((size < largest * _LEAST_SHARE).sum()),
        "layers": layers.tolist(),
        "classes": {c: [int(((layer == i) & (classes == c)).sum()) for i in layers] for c in CLASSES},
        "threshold": threshold,
        "absent": int((~there).sum()),
        "classes_by": record.stamp.get("classes_by"),
        "null": plain(dict(record.stamp.get("null", {}))),
    }
