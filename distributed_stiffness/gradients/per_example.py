"""Per-example gradients of every parameter of any network, from one forward and backward pass.

The forward pass runs under `Capture`; one backward pass, started from each example's scaled δ
(loss_head.py), stops at the outputs of the captured calls. The rest is algebra (rules/, gram.py).
What has no structured rule goes through `torch.func` for those parameters alone, and what even that
cannot do is differentiated one example at a time, with a warning.

Axis letters: N examples, P parameters.
"""

from __future__ import annotations

import copy
import fnmatch
import functools
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from distributed_stiffness.errors import GradientError, ModelError
from distributed_stiffness.gradients.batches import Inputs, call, count_examples, prepare, take
from distributed_stiffness.gradients.capture import Capture, Use, count_uses
from distributed_stiffness.gradients.gram import Factors, Rows, unit_rows
from distributed_stiffness.gradients.loss_head import Loss, LossHead, loss_head
from distributed_stiffness.gradients.precision import full_float32, precision_mode
from distributed_stiffness.gradients.rules import Linear


@dataclass(frozen=True)
class Recipe:
    """By which rule the gradient of each parameter is made; parameters by name."""

    factored: tuple[str, ...]  # weights of linear layers with one position, kept as two factors
    biases: Mapping[str, str]  # weight of a factored layer -> its bias, where that is in play
    structured: tuple[str, ...]  # materialised by a rule of rules/
    functional: tuple[str, ...]  # torch.func: vmap(grad)
    one_by_one: tuple[str, ...]  # autograd on one example at a time
    unused: tuple[str, ...]  # no use in the forward pass: the gradient is 0
    rules: Mapping[str, str]  # parameter -> the rule's name, or why it has none
    uses: Mapping[str, int]  # parameter -> calls with a rule that take it

    @property
    def dense(self) -> tuple[str, ...]:
        """Parameters of the dense row, in its order."""
        return self.structured + self.functional + self.one_by_one


class PerExampleGradients:
    """The per-example gradients of one network and loss.

    Args:
        model: in evaluation mode. It is not changed; a copy is made where the precision asks.
        loss: "cross_entropy", or a callable (outputs, targets) -> (N,).
        sample: a few examples (inputs, targets), from which the recipe is read.
        parameters: glob patterns of the parameters in play; None takes all that require gradients.
        precision: a name of precision.py.

    Raises:
        GradientError: the network makes examples depend on each other (batch statistics, dropout).
        ModelError: no parameter is in play.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        sample: tuple[Inputs, Tensor],
        *,
        parameters: Sequence[str] | None = None,
        precision: str = "float32",
    ) -> None:
        refuse_dependence(model)
        self.precision = precision_mode(precision)
        self.model = _in_dtype(model, self.precision.network)
        self.loss = copy.deepcopy(loss).double() if isinstance(loss, nn.Module) else loss
        self.parameters = parameters_in_play(self.model, parameters)
        self.device = next(iter(self.parameters.values())).device
        self.recipe = self._read_recipe(*sample)

    @property
    def n_parameters(self) -> int:
        """Parameters in play."""
        return sum(p.numel() for p in self.parameters.values())

    def bytes_per_example(self, inputs: Inputs, targets: Tensor) -> tuple[int, int]:
        """Return what one example takes: its row as it is held, and while it is being made.

        A pass keeps every captured input and output with its gradient, about twice over for what
        lies between the captured calls; a dense row exists three times while it is scaled.
        """
        rows = self.rows(inputs, targets)
        row = -(-rows.nbytes() // len(rows))
        capture, _ = self._forward(self._prepared(inputs, targets)[0])
        captured = sum(
            use.call.input.nbytes + 2 * use.output_shape.numel() * self.precision.network.itemsize
            for use in capture.uses
        )
        wide = self.precision.network.itemsize // self.precision.rows.itemsize
        # At least 1: where no parameter is used a row is empty.
        return max(1, row), max(1, 2 * captured // len(rows) + 3 * wide * row)

    def rows(self, inputs: Inputs, targets: Tensor) -> Rows:
        """Return the unit gradients of a block of examples, with their norms and losses."""
        inputs, targets = self._prepared(inputs, targets)
        with full_float32():
            head, uses = self._by_recipe(inputs, targets)
            dense = self._dense(inputs, head, uses)
        return unit_rows(
            [self._factors(uses[name]) for name in self.recipe.factored],
            dense,
            scale=head.scale,
            loss=head.loss,
            correct=head.correct,
            dtype=self.precision.rows,
        )

    def materialised(
        self, inputs: Inputs, targets: Tensor, *, unit: bool = False
    ) -> dict[str, Tensor]:
        """Return every parameter's gradient for each example, (N, *shape).

        At true scale, or with each example's whole gradient at unit norm (0 stays 0), which is
        there also where the squares of the true one are below 1e-308.
        """
        inputs, targets = self._prepared(inputs, targets)
        with full_float32():
            head, uses = self._by_recipe(inputs, targets)
            gradients = self._by_parameter(inputs, head, uses, tuple(self.parameters))
        factor = head.scale
        if unit:
            norms = [torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients.values()]
            length = torch.linalg.vector_norm(torch.stack(norms).double(), dim=0)
            factor = torch.where(length > 0, 1 / length, 0.0)
        return {
            name: g * factor.to(g.dtype).reshape(-1, *[1] * (g.dim() - 1))
            for name, g in gradients.items()
        }

    def _prepared(self, inputs: Inputs, targets: Tensor) -> tuple[Inputs, Tensor]:
        return prepare(inputs, self.precision.network, self.device), targets.to(self.device)

    def _read_recipe(self, inputs: Inputs, targets: Tensor) -> Recipe:
        """Read from two passes, of 2 and of 3 examples, what depends on the number of examples."""
        inputs, targets = self._prepared(inputs, targets)
        if count_examples(inputs) < 3:
            raise GradientError(f"at least 3 examples are needed, got {count_examples(inputs)}")
        why: dict[str, str] = {}
        for n in (2, 3):
            capture, outputs = self._forward(take(inputs, slice(n)))
            why |= capture.unstructured
            for use in capture.uses:
                if use.call.input.shape[:1] != (n,) or use.output_shape[:1] != (n,):
                    why |= dict.fromkeys(use.names.values(), "examples are not the first dimension")
                elif use.spoiled:
                    why |= dict.fromkeys(use.names.values(), "its input is overwritten in place")
        uses = capture.uses
        count = Counter(name for u in uses for name in u.names.values())
        for name, times in count_uses(outputs, self.parameters).items():
            if times > count[name]:
                why.setdefault(name, "a call that torch does not show")
        lone = {
            u.names["weight"]: u
            for u in uses
            if isinstance(u.rule, Linear)
            and "weight" in u.names
            and u.output_shape[:-1].numel() == 3  # one position an example
            and all(count[name] == 1 and name not in why for name in u.names.values())
        }
        biases = {w: u.names["bias"] for w, u in lone.items() if "bias" in u.names}
        factored = {*lone, *biases.values()}
        rest = [name for name in self.parameters if name not in factored and name not in why]
        functional, one_by_one = self._split_by_torch_func(inputs, targets, sorted(why))
        rules = {name: u.rule.name for u in uses for name in u.names.values()} | why
        return Recipe(
            factored=tuple(lone),
            biases=biases,
            structured=tuple(name for name in rest if count[name]),
            functional=functional,
            one_by_one=one_by_one,
            unused=tuple(name for name in rest if not count[name]),
            rules=rules,
            uses=count,
        )

    def _split_by_torch_func(
        self, inputs: Inputs, targets: Tensor, names: list[str]
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Try torch.func on two examples; what it cannot do is left to autograd."""
        if not names:
            return (), ()
        two = take(inputs, slice(2))
        head, _ = self._differentiate(two, targets[:2])
        try:
            with warnings.catch_warnings():
                # Where torch.func has no batched kernel it loops too, under a warning of its own.
                warnings.filterwarnings("error", "There is a performance drop")
                self._functional(two, head, tuple(names))
        except Exception as error:  # whatever torch.func cannot trace: any type of error
            modules = sorted({name.rpartition(".")[0] or "the network" for name in names})
            warnings.warn(
                f"no structured rule and no torch.func for {', '.join(names)} (in"
                f" {', '.join(modules)}): their gradients are computed one example at a time,"
                f" which takes as long as training on single examples. torch.func said: {error}",
                stacklevel=2,
            )
            return (), tuple(names)
        return tuple(names), ()

    def _forward(self, inputs: Inputs) -> tuple[Capture, Tensor]:
        with torch.enable_grad(), Capture(self.parameters) as capture:
            outputs = call(self.model, inputs)
        if not isinstance(outputs, Tensor):
            raise ModelError(
                f"the network returned {type(outputs).__name__}, expected one tensor with N first"
            )
        if outputs.shape[:1] != (count_examples(inputs),):
            raise ModelError(
                f"the network returned shape {tuple(outputs.shape)} for"
                f" {count_examples(inputs)} examples, expected N first"
            )
        return capture, outputs

    def _by_recipe(
        self, inputs: Inputs, targets: Tensor
    ) -> tuple[LossHead, dict[str, list[tuple[str, Use, Tensor]]]]:
        """Differentiate, and check that these examples use parameters as the recipe says.

        Raises:
            GradientError: they do not, as in a network whose path depends on its inputs.
        """
        head, uses = self._differentiate(inputs, targets)
        by_function = {*self.recipe.functional, *self.recipe.one_by_one}
        for name, found in uses.items():
            expected = self.recipe.uses.get(name, 0)
            if name not in by_function and len(found) != expected:
                raise GradientError(
                    f"parameter {name!r} is used {len(found)} times by a block of"
                    f" {count_examples(inputs)} examples, but {expected} times by the first few:"
                    " the network's path depends on its inputs or on the size of the block, so"
                    " that its gradients cannot be taken a block at a time"
                )
        return head, uses

    def _differentiate(
        self, inputs: Inputs, targets: Tensor
    ) -> tuple[LossHead, dict[str, list[tuple[str, Use, Tensor]]]]:
        """Forward and backward; by parameter: (role, use, gradient at the use's output)."""
        capture, outputs = self._forward(inputs)
        head = loss_head(self.loss, outputs, targets)
        grads = (
            torch.autograd.grad(
                outputs,
                [use.edge for use in capture.uses],
                grad_outputs=head.direction,
                allow_unused=True,
            )
            if capture.uses and outputs.requires_grad
            else [None] * len(capture.uses)
        )
        uses: dict[str, list[tuple[str, Use, Tensor]]] = {name: [] for name in self.parameters}
        for use, grad in zip(capture.uses, grads, strict=True):
            filled = torch.zeros(use.output_shape, dtype=outputs.dtype, device=outputs.device)
            for role, name in use.names.items():
                uses[name].append((role, use, filled if grad is None else grad))
        return head, uses

    def _factors(self, uses: list[tuple[str, Use, Tensor]]) -> Factors:
        ((_, use, grad),) = uses
        n = grad.shape[0]
        has_bias = use.names["weight"] in self.recipe.biases
        b_N = grad.new_full((n,), float(has_bias))
        return Factors(use.call.input.reshape(n, -1), grad.reshape(n, -1), b_N)

    def _dense(
        self,
        inputs: Inputs,
        head: LossHead,
        uses: Mapping[str, list[tuple[str, Use, Tensor]]],
    ) -> Tensor:
        """All parameters that are not factored, side by side: (N, P)."""
        n = count_examples(inputs)
        sizes = [self.parameters[name].numel() for name in self.recipe.dense]
        dense = torch.empty(n, sum(sizes), dtype=self.precision.network, device=self.device)
        parts = self._by_parameter(inputs, head, uses, self.recipe.dense)
        for name, place in zip(self.recipe.dense, torch.split(dense, sizes, 1), strict=True):
            place.copy_(parts.pop(name).reshape(n, -1))
        return dense

    def _by_parameter(
        self,
        inputs: Inputs,
        head: LossHead,
        uses: Mapping[str, list[tuple[str, Use, Tensor]]],
        names: tuple[str, ...],
    ) -> dict[str, Tensor]:
        n, recipe = count_examples(inputs), self.recipe
        parts: dict[str, Tensor] = {}
        for name in names:
            if name in recipe.functional or name in recipe.one_by_one:
                continue
            # The uses of a shared parameter add up before anything is multiplied.
            terms = [use.rule.per_example(role, use.call, grad) for role, use, grad in uses[name]]
            parts[name] = (
                functools.reduce(torch.add, terms)
                if terms
                else self.parameters[name].new_zeros(n, *self.parameters[name].shape)
            )
        if recipe.functional:
            parts |= self._functional(inputs, head, recipe.functional)
        if recipe.one_by_one:
            parts |= self._one_by_one(inputs, head, recipe.one_by_one)
        return {name: parts[name] for name in names}

    def _functional(
        self, inputs: Inputs, head: LossHead, names: tuple[str, ...]
    ) -> dict[str, Tensor]:
        parameters = {name: self.parameters[name].detach() for name in names}

        def projected(chosen: dict[str, Tensor], one: Inputs, direction: Tensor) -> Tensor:
            batch = _batch_of_one(one)
            args = (
                batch if isinstance(batch, tuple) else () if isinstance(batch, dict) else (batch,)
            )
            kwargs = batch if isinstance(batch, dict) else None
            outputs: Tensor = torch.func.functional_call(self.model, chosen, args, kwargs)
            return (outputs.squeeze(0) * direction).sum()

        # No graph over the parameters that are not asked for; of the attention kernels only the
        # plain one can be batched over examples.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            per_example = torch.func.vmap(torch.func.grad(projected), in_dims=(None, 0, 0))
            return dict(per_example(parameters, inputs, head.direction))

    def _one_by_one(
        self, inputs: Inputs, head: LossHead, names: tuple[str, ...]
    ) -> dict[str, Tensor]:
        tensors = [self.parameters[name] for name in names]
        found: list[list[Tensor]] = []
        for i in range(count_examples(inputs)):
            with torch.enable_grad():
                outputs = call(self.model, take(inputs, slice(i, i + 1)))
                projected = (outputs * head.direction[i : i + 1]).sum()
                grads = torch.autograd.grad(projected, tensors, allow_unused=True)
            found.append(
                [
                    torch.zeros_like(t) if g is None else g.to_dense()
                    for t, g in zip(tensors, grads, strict=True)
                ]
            )
        return {
            name: torch.stack(column)
            for name, column in zip(names, zip(*found, strict=True), strict=True)
        }


def _batch_of_one(one: Inputs) -> Inputs:
    """Make a batch of one example."""
    if isinstance(one, Tensor):
        return one.unsqueeze(0)
    if isinstance(one, dict):
        return {key: value.unsqueeze(0) for key, value in one.items()}
    return tuple(value.unsqueeze(0) for value in one)


def parameters_in_play(model: nn.Module, patterns: Sequence[str] | None) -> dict[str, Tensor]:
    """Return the parameters that require gradients and match a pattern, by name; tied ones once.

    Raises:
        ModelError: none is left, or a pattern matches nothing.
    """
    trainable: dict[str, Tensor] = {
        name: p for name, p in model.named_parameters() if p.requires_grad
    }
    if patterns is not None:
        for pattern in patterns:
            if not fnmatch.filter(trainable, pattern):
                raise ModelError(
                    f"no trainable parameter matches {pattern!r}; there are: {', '.join(trainable)}"
                )
        trainable = {
            name: p
            for name, p in trainable.items()
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        }
    if not trainable:
        raise ModelError("the network has no parameter that requires a gradient")
    return trainable


def refuse_dependence(model: nn.Module) -> None:
    """Refuse modules that make one example's gradient depend on chance or on its company.

    Raises:
        GradientError: batch statistics or dropout are in use; the message names the module.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.training:
                raise GradientError(
                    f"batch normalisation {name!r} is in training mode, so that an example's"
                    " gradient would depend on its batch: call model.eval() first"
                )
            if module.running_mean is None:
                raise GradientError(
                    f"batch normalisation {name!r} keeps no running statistics, so that an"
                    " example's gradient would depend on its batch: build it with"
                    " track_running_stats=True, or use another normalisation"
                )
        if module.training and _dropout_share(module) > 0:
            raise GradientError(
                f"the dropout of {name!r} is active, so that gradients would be random: call"
                " model.eval() first"
            )


def _dropout_share(module: nn.Module) -> float:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention):
        return float(module.dropout)
    return 0.0


def _in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    floating = {t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()}
    return model if floating <= {dtype} else copy.deepcopy(model).to(dtype)
