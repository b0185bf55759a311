"""The table of contents: every public name and where it lives; read at run time too, see ``__init__.py``."""

from .analysis.channels.channel import Channel as Channel
from .analysis.channels.channel import Circuit as Circuit
from .analysis.channels.channel_tokens import ChannelTokens as ChannelTokens
from .analysis.channels.head_circuits import HeadCircuits as HeadCircuits
from .analysis.channels.head_tokens import HeadTokens as HeadTokens
from .analysis.channels.offsets import MeanCircuit as MeanCircuit
from .analysis.channels.offsets import OffsetProfile as OffsetProfile
from .analysis.channels.pair_angles import PairAngles as PairAngles
from .analysis.crowding.coherence import Coherence as Coherence
from .analysis.crowding.interference import Interference as Interference
from .analysis.crowding.recovery import Recovery as Recovery
from .analysis.depth.linear_composition import LinearComposition as LinearComposition
from .analysis.depth.paths import Paths as Paths
from .analysis.ledger.bandwidth import Bandwidth as Bandwidth
from .analysis.ledger.basis import Basis as Basis
from .analysis.memory.clearing import Clearing as Clearing
from .analysis.memory.erasure import Erasure as Erasure
from .analysis.memory.head_erasers import HeadErasers as HeadErasers
from .analysis.memory.neurons import Neurons as Neurons
from .analysis.pairs.composition import ComponentComposition as ComponentComposition
from .analysis.pairs.composition import Composition as Composition
from .analysis.pairs.composition_sketch import CompositionSketch as CompositionSketch
from .analysis.pairs.contribution import Contribution as Contribution
from .analysis.pairs.feature_edges import FeatureEdges as FeatureEdges
from .analysis.pairs.feature_edges import FeatureInterference as FeatureInterference
from .analysis.pairs.head_units import HeadUnits as HeadUnits
from .analysis.pairs.neuron_heads import HeadNeuron as HeadNeuron
from .analysis.pairs.neuron_heads import NeuronHead as NeuronHead
from .analysis.pairs.neuron_neuron import (
    NeuronCosines as NeuronCosines,
)
from .analysis.pairs.neuron_neuron import (
    NeuronNeuron as NeuronNeuron,
)
from .analysis.pairs.neuron_neuron import (
    NeuronReaders as NeuronReaders,
)
from .analysis.pairs.overlap import Overlap as Overlap
from .analysis.pairs.subspaces import Subspaces as Subspaces
from .analysis.pairs.vectors import VectorReaders as VectorReaders
from .analysis.pairs.vectors import VectorWriters as VectorWriters
from .atlas import Atlas as Atlas
from .atlas import edges as edges
from .atlas import export as export
from .atlas import status as status
from .errors import (
    ArchitectureError as ArchitectureError,
)
from .errors import (
    CheckpointError as CheckpointError,
)
from .errors import (
    MalformedCheckpointError as MalformedCheckpointError,
)
from .errors import (
    MissingTensorError as MissingTensorError,
)
from .errors import (
    NonFiniteError as NonFiniteError,
)
from .errors import (
    OfflineError as OfflineError,
)
from .errors import (
    RecordError as RecordError,
)
from .errors import (
    ResourceError as ResourceError,
)
from .errors import (
    UnsafeCheckpointError as UnsafeCheckpointError,
)
from .errors import (
    UsageError as UsageError,
)
from .errors import (
    VirtualWeightsError as VirtualWeightsError,
)
from .linalg import (
    LinearMap as LinearMap,
)
from .linalg import (
    Spectrum as Spectrum,
)
from .linalg import (
    Subspace as Subspace,
)
from .linalg import (
    eigenvalues as eigenvalues,
)
from .linalg import (
    principal_angles as principal_angles,
)
from .linalg import (
    svd as svd,
)
from .record import Record as Record
from .record.attribution_graph import AttributionGraph as AttributionGraph
from .record.feature_labels import FeatureLabels as FeatureLabels
from .record.graph_node import GraphLink as GraphLink
from .record.graph_node import GraphNode as GraphNode
from .report import report as report
from .runtime.edges.ablation import Ablation as Ablation
from .runtime.edges.ablation import EdgeAblation as EdgeAblation
from .runtime.edges.ablation import EdgeSetAblation as EdgeSetAblation
from .runtime.edges.attribution import Attribution as Attribution
from .runtime.edges.attribution import LogitDifference as LogitDifference
from .runtime.edges.edge_tokens import EdgeTokens as EdgeTokens
from .runtime.edges.steering import VectorEffect as VectorEffect
from .runtime.fate.erased import Erased as Erased
from .runtime.fate.frontier import ErasurePolicy as ErasurePolicy
from .runtime.fate.frontier import Frontier as Frontier
from .runtime.fate.persistence import (
    ErasedBy as ErasedBy,
)
from .runtime.fate.persistence import (
    Persistence as Persistence,
)
from .runtime.fate.persistence import (
    PersistenceSummary as PersistenceSummary,
)
from .runtime.features.coactivity import coactivations as coactivations
from .runtime.features.training import train_lora as train_lora
from .runtime.features.training import train_transcoders as train_transcoders
from .runtime.flow.labels import Labels as Labels
from .runtime.flow.observation import Observation as Observation
from .runtime.flow.trace import Lens as Lens
from .runtime.flow.trace import Route as Route
from .runtime.flow.trace import Trace as Trace
from .runtime.flow.vector_activity import VectorActivity as VectorActivity
from .runtime.running.run import Run as Run
from .statements import Statements as Statements
from .stream import Features as Features
from .stream import Head as Head
from .stream import Mlp as Mlp
from .stream import Stream as Stream
from .stream import virtual_weight as virtual_weight
from .stream.build import open as open
from .stream.coactivations import Coactivations as Coactivations
from .stream.moments import Moments as Moments
from .stream.operating_point import OperatingPoint as OperatingPoint
from .stream.vector import Vector as Vector
from .stream.vector import open_vector as open_vector
from .survey import Survey as Survey
from .survey import Validation as Validation
from .survey.plan import Part as Part
from .survey.plan import Plan as Plan
from .survey.plan import map as map

__version__: str
