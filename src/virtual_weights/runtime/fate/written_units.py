"""What single writers wrote at single tokens: how much it helps, how much it disturbs, how much of it is erased."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from virtual_weights.errors import UsageError
from virtual_weights.linalg import Centring, accumulate
from virtual_weights.linalg.numerics import SPREAD_ROUNDING, THREE_DIGITS
from virtual_weights.progress import Progress, silent
from virtual_weights.runtime.edges.losses import next_token_loss
from virtual_weights.runtime.running.hooks import Place, Signal, leaf, module_of, places, state_module, watching, wide
from virtual_weights.runtime.running.run import Run
from virtual_weights.stream import Group, Stream
from virtual_weights.stream.effective import centring


@final
@dataclass(frozen=True, eq=False)
class WrittenUnits:
    """One unit is what one writer w (a head, an MLP, an embedding) wrote at one token t, ``y = y_w(t)``.

    Tensors are (writers, tokens); NaN where a writer wrote exactly nothing, which is not a unit.

    Attributes:
        writers: their labels, in order of depth.
        utility: ``U = <g_q(t), mean y_w - y_w(t)>``, nats: the first-order change of the sequence's summed next-token
            loss when y is replaced by its mean over tokens. g_q is the loss's gradient at q, the state in which y
            first appears, through all that follows (attention, norm scalars). Positive where y helps.
        interference: ``I = sum_r |R~_r y|^2 / s_p(t)^2 / e_r`` over the reading groups r that y reaches except the
            intended one. R~_r is all rows of Q, K and V of an attention, of an MLP's gate and up, or of the
            unembedding; p is the state that it reads, s its norm scalar, and ``e_r = mean_t |R~_r x_p(t)|^2 /
            s_p(t)^2`` the energy that it receives in all, so that groups compare: the unit is a group's whole input.
        erased: ``m = clamp(-<x_final(t) - x_q(t), y> / |y|^2, 0, 1)``: how much of y later writers removed,
            of centred y and x where a LayerNorm reads them.
        intended: the reading group on which a writer's mean share of energy is largest, None where nothing reads it.
    """

    writers: tuple[str, ...]
    utility: Tensor
    interference: Tensor
    erased: Tensor
    intended: tuple[str | None, ...]

    def optimum(self, price: float) -> Tensor:
        """``m = 1 iff U < price I``, (writers, tokens): what maximises ``value``, unit by unit.

        At a price that is a unit's own U/I both do equally well: up to rounding it stays.
        """
        rounding = SPREAD_ROUNDING * torch.finfo(self.utility.dtype).eps
        return (self.utility < price * self.interference * (1 - rounding)).to(self.utility)

    def value(self, policy: Tensor, price: float) -> float:
        """``E[(1 - m)(U - price I)]``, nats, mean over units, for a policy m (writers, tokens) in 0 .. 1; 1 erases."""
        return float(((1 - policy) * (self.utility - price * self.interference)).double().nanmean())


def written_units(run: Run, sequences: int | None = None, batch: int = 2, progress: Progress = silent) -> WrittenUnits:
    """Run a model on whole chunks, once forward and back, and measure every unit.

    The last token of a sequence predicts nothing that counts and gives no unit. All states, gradients and inner
    activations are in memory at once, some six numbers per layer, token and width; every pair of a writer and a
    reading group costs about ``d^2 k`` for heads and ``tokens d^2`` for MLPs.

    Args:
        run: the model, with the norm's gain in its readers, and its tokens. Its parameters' gradients are left alone.
        sequences: how many of the run's whole chunks; None takes all.
        batch: sequences in one backward pass.
        progress: called with (steps done, steps): batches, then reading groups.

    Returns:
        The units of all writers but biases, sequences after one another. None of it depends on the basis of the stream,
        utility and erasure not on the heads' inner bases either; interference does, being energy at a port.

    Raises:
        UsageError: readers without gain, or chunks without a token whose prediction counts.
    """
    stream = run.stream
    if not stream.folded:
        raise UsageError(
            "interference needs the norm's gain in the readers",
            expected="norm gains folded into the readers",
            do="open the model without fold=False (--no-fold)",
        )
    batches = run.sequences(sequences).split(batch)
    readers = [group for group in stream.groups if group.ports]
    passes: list[tuple[dict[Place, Tensor], list[Tensor]]] = []
    for i, tokens in enumerate(batches):
        passes.append(_backward(run, tokens))
        progress(i + 1, len(batches) + len(readers))
    signals = {place: torch.cat([signals[place] for signals, _ in passes]) for place in passes[0][0]}
    gradients = [torch.cat(parts) for parts in zip(*(gradients for _, gradients in passes), strict=True)]
    outputs = [_Output.of(stream, group, signals) for group in stream.groups.writers if not group.constant]
    for i, reader in enumerate(readers):
        assert reader.reads is not None
        _receive(stream, reader, signals["state", reader.reads], [o for o in outputs if o.group.reaches(reader.reads)])
        progress(len(batches) + i + 1, len(batches) + len(readers))
    states = [signals["state", p] for p in range(stream.states)]
    centre = Centring(stream.d_model, accumulate).dense().to(states[0]) if centring(stream) else None
    return _units(outputs, gradients, states, centre)


@dataclass(eq=False)
class _Output:
    """What the writers of one group wrote, ``y = O z``, and the energy that it puts on readers."""

    group: Group
    inner: Tensor  # z, (m, tokens, k)
    maps: Tensor | None  # O, (m, d, k), None for the identity

    @classmethod
    def of(cls, stream: Stream, group: Group, signals: dict[Place, Tensor]) -> _Output:
        """What a run shows of a group."""
        if group.kind != "head":
            return cls(group, signals["written", group.id][None], None)
        z = signals["inner", group.id].transpose(0, 1)
        return cls(group, z, stream.write(group).to(z))

    def __post_init__(self) -> None:
        self.largest = self.inner.new_zeros(self.inner.shape[:2])  # energy on the intended reader, and on the others
        self.others = torch.zeros_like(self.largest)
        self.intended: list[str | None] = [None] * len(self.group.labels)

    def along(self, vectors: Tensor) -> Tensor:
        """``O^T v(t)``, (m, tokens, k), for (tokens, d): products with y are those of z with it."""
        return vectors[None] if self.maps is None else torch.einsum("mdk,nd->mnk", self.maps, vectors)

    def energy(self, gram: Tensor | None = None) -> Tensor:
        """``y^T G y``, (m, tokens), as ``z^T (O^T G O) z``; without G ``|y|^2``."""
        if self.maps is None:
            turned = self.inner if gram is None else self.inner @ gram
        else:
            turned = self.inner @ (self.maps.mT @ (self.maps if gram is None else gram @ self.maps))
        return (turned * self.inner).sum(-1).clamp(min=0)

    def put(self, reader: str, energy: Tensor) -> None:
        """Count the energy put on one more reader; the one of largest mean is the intended one.

        Of those that are equal to three digits the first is: where one writer alone has written, all readers receive
        the same share.
        """
        larger = energy.mean(1) > self.largest.mean(1) * (1 + THREE_DIGITS)
        self.others += torch.where(larger[:, None], self.largest, energy)
        self.largest = torch.where(larger[:, None], energy, self.largest)
        self.intended = [reader if yes else old for yes, old in zip(larger.tolist(), self.intended, strict=True)]


def _units(outputs: list[_Output], gradients: list[Tensor], states: list[Tensor], seen: Tensor | None) -> WrittenUnits:
    """Put the groups together; ``seen`` is the projection that a norm makes of a state, None where it makes none."""
    columns: list[Tensor] = []
    for output in outputs:
        z, size, first = output.inner, output.energy(seen), output.group.first
        utility = (output.along(gradients[first]) * (z.mean(1, keepdim=True) - z)).sum(-1)
        change = states[-1] - states[first]
        later = (output.along(change if seen is None else change @ seen) * z).sum(-1)
        erased = (-later / size).clamp(0, 1)
        columns.append(torch.stack([utility, output.others, erased]).masked_fill(size == 0, torch.nan))
    utility, interference, erased = torch.cat(columns, 1).cpu()
    writers = tuple(label for output in outputs for label in output.group.labels)
    return WrittenUnits(writers, utility, interference, erased, tuple(r for o in outputs for r in o.intended))


def _receive(stream: Stream, reader: Group, x: Tensor, outputs: list[_Output]) -> None:
    """Count what every writer puts on one reading group; one that receives nothing reads nothing."""
    gram = torch.zeros((x.shape[1], x.shape[1]), dtype=x.dtype, device=x.device)
    for port in reader.ports:
        rows = stream.read(port, reader).maps.flatten(0, 1).to(x)
        gram += rows.T @ rows
    weight = 1 / stream.scale(x, reader).square()
    received = ((x @ gram) * x).sum(1).mul(weight).mean()
    if received > 0:
        for output in outputs:
            output.put(reader.id, output.energy(gram) * weight / received)


def _backward(run: Run, tokens: Tensor) -> tuple[dict[Place, Tensor], list[Tensor]]:
    """What a batch's components wrote, the states they made, and the gradient of the summed loss at every state.

    All are (tokens, ...), without the last token of each sequence.
    """
    stream, module = run.stream, run.module
    signals: dict[Place, Tensor] = {}
    states: dict[int, Tensor] = {}

    def flat(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().expand(len(tokens), *tensor.shape[1:])  # learned positions are computed once
        return wide(tensor[:, :-1].flatten(0, 1))

    def see(signal: Signal, where: Any, tensor: Tensor) -> None:
        signals[signal, where] = flat(tensor)

    def keep(state: int, _module: object, given: tuple[Tensor, ...]) -> None:
        states[state] = given[0]

    wanted: list[Place] = [*places(stream, "state", "written"), *(("inner", g.id) for g in stream.groups.heads)]
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.callback(module_of(module, stream, "embed", "embed").register_forward_hook(leaf).remove)
        stack.enter_context(watching(module, stream, wanted, see))
        for state in range(stream.states):
            hook = state_module(module, stream, state).register_forward_pre_hook(partial(keep, state))
            stack.callback(hook.remove)
        loss = next_token_loss(module(tokens, use_cache=False).logits, tokens, run.first)
        total = loss.sum() * (tokens.shape[1] - run.first)
        gradients = torch.autograd.grad(total, [states[p] for p in range(stream.states)])
    return signals, [flat(gradient) for gradient in gradients]
