"""Maps, spectra, subspaces, nulls and the all-pairs kernel. This folder has never heard of a transformer.

Columns are vectors, a map has shape (out, in), right singular vectors are ``V``; decompositions are in float64.
"""

from virtual_weights.linalg.decompose import (
    SVD,
    eigenvalues,
    frobenius_norm,
    singular_values,
    spectral_norm,
    svd,
    trace,
)
from virtual_weights.linalg.gram import Pairs, all_pairs
from virtual_weights.linalg.linear_map import Centring, Dense, Diagonal, Identity, LinearMap, Product, Sum
from virtual_weights.linalg.map_stack import MapStack, self_moments
from virtual_weights.linalg.null import (
    benjamini_hochberg,
    draw_null,
    haar_moments,
    haar_orthogonal,
    overlap_moments,
    spectrum_null_edge,
)
from virtual_weights.linalg.numerics import accumulate, tolerance
from virtual_weights.linalg.pairing import Progress
from virtual_weights.linalg.spectrum import Spectrum
from virtual_weights.linalg.subspace import (
    Subspace,
    column_space,
    complement,
    intersection,
    overlap,
    principal_angles,
    row_space,
    sum_of,
)

__all__ = [
    "SVD",
    "Centring",
    "Dense",
    "Diagonal",
    "Identity",
    "LinearMap",
    "MapStack",
    "Pairs",
    "Product",
    "Progress",
    "Spectrum",
    "Subspace",
    "Sum",
    "accumulate",
    "all_pairs",
    "benjamini_hochberg",
    "column_space",
    "complement",
    "draw_null",
    "eigenvalues",
    "frobenius_norm",
    "haar_moments",
    "haar_orthogonal",
    "intersection",
    "overlap",
    "overlap_moments",
    "principal_angles",
    "row_space",
    "self_moments",
    "singular_values",
    "spectral_norm",
    "spectrum_null_edge",
    "sum_of",
    "svd",
    "tolerance",
    "trace",
]
