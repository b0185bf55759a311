"""The 25 statements: lemmas L1-L12, theorems T1-T7, corollaries C1-C6 of the text that this project began from."""

from __future__ import annotations

from virtual_weights.statements import (
    basis,
    capacity,
    composed,
    interference,
    memory,
    null_space,
    running,
    spectra,
    superposed,
)
from virtual_weights.statements.evidence import Statement

STATEMENTS = (
    Statement(
        "L1",
        "No privileged basis",
        "Rotating the stream together with every matrix that meets it leaves the model as it was.",
        "So with RMSNorm once its gain is folded into the readers, with LayerNorm once the writers are centred too; "
        "biases and positions turn along. Only orthogonal maps keep the norm. What training made of it is another "
        "question: trained streams do have preferred coordinates.",
        basis.no_privileged_basis,
    ),
    Statement(
        "L2",
        "Capacity for independent signals",
        "Layers that communicate independently have ranks that add up to d at most.",
        "Necessary where arbitrary signals are separated exactly, linearly and at once. Trained models do not keep to "
        "it: their writers claim many times d.",
        capacity.independent_signals,
    ),
    Statement(
        "L3",
        "Linear layers compose",
        "Two residual layers in sequence are I + T1 + T2 + T2 T1.",
        "Exact for linear layers; a model's blocks are linear only with attention, norm scalars and gates held at "
        "their values on one prompt.",
        running.composed_blocks,
    ),
    Statement(
        "L4",
        "Null spaces lose information",
        "What lies in the null space of a layer's map cannot be recovered by later layers.",
        "It is kept: (I + T) v = v. That reader does not see it; others may. Lost is only what T maps to its negative.",
        null_space.null_space_is_kept,
    ),
    Statement(
        "L5",
        "Virtual weights multiply",
        "The virtual weight from i to k is that from j to k times that from i to j.",
        "The shapes agree by chance only. The direct weight is one term; through j there is another, R_k T_j O_i, and "
        "the total is the sum over paths. Both are equal where R_k (T_j - I) O_i = 0.",
        composed.virtual_weights_compose,
    ),
    Statement(
        "L6",
        "Eigenvalues are channel strengths",
        "Eigenvalues of a virtual weight are the strengths of its independent channels.",
        "Singular values are: a virtual weight is rectangular in general. Eigenvalues say whether a map of the stream "
        "to itself copies or erases.",
        spectra.eigenvalues_are_strengths,
    ),
    Statement(
        "L7",
        "The stream is a direct sum",
        "The stream decomposes into a direct sum of functional subspaces.",
        "Only where their dimensions add up to the dimension of their sum, which a chosen few do and all of a trained "
        "model do not.",
        capacity.direct_sum,
    ),
    Statement(
        "L8",
        "Principal angles measure interference",
        "Interference of two heads is proportional to the cosine of the first principal angle.",
        "It is bounded by it: ||R O|| is at most ||R|| ||O|| cos. Angles and gains alone do not fix ||R O||_F: inner "
        "products of the singular directions, weighted by both gains, do.",
        interference.angles_bound,
    ),
    Statement(
        "L9",
        "Superposed signals can be recovered",
        "Signals along nearly orthogonal directions can share the stream and be recovered.",
        "With an error that coherence and the number of signals set, and that depends on the method of recovery.",
        superposed.recovery,
    ),
    Statement(
        "L10",
        "Interference grows with the square",
        "Interference grows as n(n-1)/2 and the error of each signal as its root.",
        "The total over pairs grows as n squared. With uncorrelated amplitudes of mean zero the squared error of one "
        "signal grows as n, its error as the root of n.",
        superposed.growth,
    ),
    Statement(
        "L11",
        "Antiparallel weights erase best",
        "Clearing is most efficient where a neuron's input and output weights are antiparallel.",
        "In direction, yes. How much is cleared is the gain, which the cosine does not know.",
        memory.efficiency,
    ),
    Statement(
        "L12",
        "The best policy of memory",
        "The best policy maximises E[U (1 - m) - lambda I].",
        "Its maximum does not depend on lambda: where U is not negative nothing is ever erased. With "
        "E[(1 - m)(U - lambda I)] the best policy erases where U is below lambda I.",
        memory.best_policy,
    ),
    Statement(
        "T1",
        "Rank bounds communication",
        "The rank of a sequence of layers is at most the least rank among them.",
        "For a product along one path. With the stream beside it, prod(I + T), the rank is d in general; the update "
        "has at most the sum of the ranks.",
        composed.composed_rank,
    ),
    Statement(
        "T2",
        "Rank of a virtual weight",
        "A virtual weight has at most the smaller of its factors' ranks.",
        "True, and it has at least rank R + rank O - d (Sylvester).",
        spectra.rank_bound,
    ),
    Statement(
        "T3",
        "Disjoint heads do not interfere",
        "Heads on subspaces that meet only in 0 do not interfere.",
        "They do unless the one's row space is orthogonal to the other's column space: R O = 0.",
        interference.trivial_intersection,
    ),
    Statement(
        "T4",
        "The bottleneck",
        "About 100 d neurons stand before and after the stream, a compression of N_b N_a / d^2, ten thousand.",
        "The counts belong to fifty layers of 4 d at mid-depth. The ratio compares nothing: a map of rank d saves "
        "N_a N_b / (d (N_a + N_b - d)), there about fifty.",
        capacity.bottleneck,
    ),
    Statement(
        "T5",
        "Capacity in superposition",
        "At most d / eps^2 directions fit with cosines up to eps.",
        "No upper bound: random codes reach exp(c eps^2 d). Below, Welch bounds the coherence of N directions. Linear "
        "in d is how many signals can be active at once and still be read linearly.",
        superposed.capacity_bound,
    ),
    Statement(
        "T6",
        "Clearing",
        "A component that reads by W and writes -V clears a dimension where V W is nearly I.",
        "V W is I on its rank at most. For one direction the gain must be 1, slope and norm scalar included: less "
        "attenuates, 2 reflects. A head must attend to the position too.",
        memory.clearing,
    ),
    Statement(
        "T7",
        "Conditional memory management",
        "Managing memory by context gives fine control over what is kept.",
        "A mechanism that exists; whether a model uses it shows in how its clearing varies over tokens.",
        running.conditional_clearing,
    ),
    Statement(
        "C1",
        "Distant layers talk directly",
        "Virtual weights let layers that are not neighbours communicate.",
        "True.",
        interference.distant_edges,
    ),
    Statement(
        "C2",
        "Effective communication space",
        "The effective space is the intersection of the complements of all null spaces.",
        "It is the sum of the later row spaces; what nobody reads is the intersection of the null spaces.",
        null_space.communication_space,
    ),
    Statement(
        "C3",
        "Effective dimension",
        "The effective dimension of a channel is the number of singular values clearly above zero.",
        "Given a threshold, and that must come from a null.",
        spectra.effective_dimension,
    ),
    Statement(
        "C4",
        "Total capacity",
        "The dimensions of all subspaces add up to d at most.",
        "For independent subspaces.",
        capacity.total_capacity,
    ),
    Statement(
        "C5",
        "Orthogonal subspaces interfere least",
        "Interference is least where subspaces are nearly orthogonal.",
        "True: it is zero where they are orthogonal. Short of that the gains count too.",
        interference.orthogonal_is_least,
    ),
    Statement(
        "C6",
        "Number against fidelity",
        "More superposed signals mean less fidelity of each.",
        "For linear read-out once n exceeds d, and for any method with noise or crowded directions. Up to d "
        "independent signals are read exactly by who knows which are active; all else depends on the method.",
        superposed.trade_off,
    ),
)
