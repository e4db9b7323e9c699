"""Calls that torch makes in one piece, taken apart into calls that have rules.

The parts are the same sums in another order, so that results move in the last digits only.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Cell = Callable[[Tensor, tuple[Tensor, ...], Tensor, Tensor | None], tuple[Tensor, ...]]


def _attention() -> Callable[..., Any]:
    """Multi-head attention as torch writes it, but showing the calls that it is made of.

    torch's function asks first whether a mode is listening, and if so shows itself whole. A copy
    that always hears "no" makes its inner calls, linear layers among them, one by one.
    """
    function = F.multi_head_attention_forward
    names = {**function.__globals__, "has_torch_function": lambda _: False}
    copy = types.FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _lstm(x_4h: Tensor, state: tuple[Tensor, ...], W_hh: Tensor, b_hh: Tensor | None) -> Any:
    h, c = state
    i, f, g, o = (x_4h + F.linear(h, W_hh, b_hh)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(x_3h: Tensor, state: tuple[Tensor, ...], W_hh: Tensor, b_hh: Tensor | None) -> Any:
    (h,) = state
    x_r, x_z, x_n = x_3h.chunk(3, -1)
    h_r, h_z, h_n = F.linear(h, W_hh, b_hh).chunk(3, -1)
    z = (x_z + h_z).sigmoid()
    n = (x_n + (x_r + h_r).sigmoid() * h_n).tanh()
    return (z * (h - n) + n,)


def _rnn(activation: Callable[[Tensor], Tensor]) -> Cell:
    def cell(
        x_h: Tensor, state: tuple[Tensor, ...], W_hh: Tensor, b_hh: Tensor | None
    ) -> tuple[Tensor, ...]:
        return (activation(x_h + F.linear(state[0], W_hh, b_hh)),)

    return cell


def _one_cell(cell: Cell) -> Callable[..., Any]:
    """`lstm_cell`, `gru_cell` and the like: one step."""

    def run(
        x: Tensor,
        state: Tensor | Sequence[Tensor],
        W_ih: Tensor,
        W_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Any:
        states = (state,) if isinstance(state, Tensor) else tuple(state)
        new = cell(F.linear(x, W_ih, b_ih), states, W_hh, b_hh)
        return new[0] if isinstance(state, Tensor) else new

    return run


def _layers(cell: Cell) -> Callable[..., Any]:
    """`lstm`, `gru` and the like: every layer, direction and step of an unpacked sequence."""

    def run(x: Tensor, state: Any, weights: Tensor | Sequence[Tensor], *options: Any) -> Any:
        if len(options) != 6 or isinstance(weights, Tensor):
            return NotImplemented  # a packed sequence
        has_biases, n_layers, dropout, train, bidirectional, batch_first = options
        states = [state] if isinstance(state, Tensor) else list(state)
        each = 4 if has_biases else 2
        directions = 2 if bidirectional else 1
        if (dropout and train) or len(weights) != each * n_layers * directions:
            return NotImplemented  # chance; or an LSTM with a projection
        steps = x.transpose(0, 1) if batch_first else x  # (T, N, d)
        finals = []
        for layer in range(n_layers):
            outputs = []
            for direction in range(directions):
                place = layer * directions + direction
                W_ih, W_hh, *biases = weights[each * place : each * (place + 1)]
                b_ih, b_hh = biases or (None, None)
                run_through = steps.flip(0) if direction else steps
                now = tuple(s[place] for s in states)
                hidden = []
                for x_N in F.linear(run_through, W_ih, b_ih).unbind(0):
                    now = cell(x_N, now, W_hh, b_hh)
                    hidden.append(now[0])
                stacked = torch.stack(hidden)
                outputs.append(stacked.flip(0) if direction else stacked)
                finals.append(now)
            steps = torch.cat(outputs, -1)
        output = steps.transpose(0, 1) if batch_first else steps
        return (output, *(torch.stack(part) for part in zip(*finals, strict=True)))

    return run


class TakenApart(TorchFunctionMode):
    """Make every call that can be taken apart in its parts, while the mode is active."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the parts, or the call."""
        kwargs = kwargs or {}
        output = take_apart(self, func, args, kwargs)
        return func(*args, **kwargs) if output is NotImplemented else output


def take_apart(
    mode: TorchFunctionMode,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run a call's parts where `mode` sees them; NotImplemented where it has none."""
    if func not in DECOMPOSITIONS:
        return NotImplemented
    with mode:
        return DECOMPOSITIONS[func](*args, **kwargs)


DECOMPOSITIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.multi_head_attention_forward: _attention(),
    torch.lstm: _layers(_lstm),
    torch.gru: _layers(_gru),
    torch.rnn_tanh: _layers(_rnn(torch.tanh)),
    torch.rnn_relu: _layers(_rnn(torch.relu)),
    torch.lstm_cell: _one_cell(_lstm),
    torch.gru_cell: _one_cell(_gru),
    torch.rnn_tanh_cell: _one_cell(_rnn(torch.tanh)),
    torch.rnn_relu_cell: _one_cell(_rnn(torch.relu)),
}
