"""Attention over short sequences by whole products, where oneDNN multiplies.

torch's fused kernel of attention multiplies a few rows at a time, each by a call to oneDNN that
takes longer than the product (design 0004). The plain formula multiplies all heads of a batch in
one call; it makes T² numbers for each, which is little while T is small.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from distributed_stiffness.gradients.precision import onednn_multiplies

# The plain formula, as torch calls it itself. To choose it by `sdpa_kernel` would be a setting of
# the whole process, which two threads would leave changed.
_plain: Callable[..., tuple[Tensor, Tensor]] | None = getattr(
    torch, "_scaled_dot_product_attention_math", None
)
# Up to so many pairs of positions the plain formula is faster: at 197 positions 30 ms against 65,
# at 512 positions 190 against 105 (64 times 3 and 8 times 12 heads of 64; forward and backward).
_SHORT = 256**2
# And T numbers are no more than so many times what a position of a head has.
_NARROW = 8


class ShortAttention(TorchFunctionMode):
    """Take the plain formula for short sequences while the mode is active."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Make the call."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and _plain and _is_short(*args, **kwargs):
            return _plain(*args, **kwargs)[0]
        return func(*args, **kwargs)


def _is_short(query: Tensor, key: Tensor, *_: Any, **__: Any) -> bool:
    is_for_onednn = query.device.type == "cpu" and query.dtype == torch.float32
    is_few = key.shape[-2] <= _NARROW * query.shape[-1]
    is_short = query.shape[-2] * key.shape[-2] <= _SHORT
    return is_for_onednn and is_short and is_few and onednn_multiplies()
