"""Networks of the field whose rows are not simply examples: text, video, windows, packed sequences.

Each is right one example at a time, which is how its true gradients are made.

Axis letters: N examples, T positions, d features, W windows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from field_truth import CLASSES, FEATURES, TOKENS, WIDTH, Case, all_alike, features, images
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence


class Embeds(nn.Module):
    """What most have: an embedding, two layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Embedding(TOKENS, FEATURES, padding_idx=0)
        self.a, self.b = nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, FEATURES)
        self.l = nn.Linear(FEATURES, CLASSES)


class Trims(Embeds):
    """Cuts padding to the longest text of the batch, then folds texts and positions."""

    def forward(self, x: Tensor) -> Tensor:
        n = (x != 0).sum(1)
        x = x[:, : int(n.max())]
        h = self.e(x)
        h = h + self.b(torch.tanh(self.a(h.reshape(-1, FEATURES)))).reshape(h.shape)
        return self.l((h * (x != 0)[..., None]).sum(1) / n[:, None])


class Folds(Embeds):
    """(N, T, d) -> (N·T, d) by hand, as GPT-2's own layers do."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.e(x)
        h = self.b(torch.tanh(self.a(h.reshape(-1, FEATURES)))).view(h.shape)
        return self.l(h.tanh().mean(1))


class TimeFirst(nn.Module):
    """(N, T, d) -> (T·N, d)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.l = nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        z = x.transpose(0, 1)
        steps, n, d = z.shape
        return self.l(torch.tanh(self.a(z.reshape(steps * n, d))).view(steps, n, -1).mean(0))


class Video(nn.Module):
    """Convolutions over folded frames, (N·T, C, H, W), or (T·N, C, H, W) if `time_first`."""

    def __init__(self, time_first: bool, *, grouped: bool = False) -> None:
        super().__init__()
        self.time_first = time_first
        self.c = nn.Conv2d(2, 4, 3, padding=1, groups=2 if grouped else 1)
        self.d = nn.Conv2d(4, 4, 3, groups=4 if grouped else 1)
        self.l = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        z = x.transpose(0, 1) if self.time_first else x
        h = self.d(torch.tanh(self.c(z.reshape(-1, *x.shape[2:])))).tanh().mean((2, 3))
        return self.l(h.view(*z.shape[:2], -1).mean(0 if self.time_first else 1))


class Windows(nn.Module):
    """Attention in windows of two positions: (N·W, 2, d), or (W·N, 2, d) if `windows_first`."""

    def __init__(self, windows_first: bool) -> None:
        super().__init__()
        self.windows_first = windows_first
        self.q, self.b = nn.Linear(FEATURES, 3 * FEATURES), nn.Parameter(torch.randn(2, 2))
        self.n, self.l = nn.LayerNorm(FEATURES), nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        w = x.unflatten(1, (-1, 2))
        w = w.transpose(0, 1) if self.windows_first else w
        q, k, v = self.q(self.n(w.reshape(-1, 2, FEATURES))).chunk(3, -1)
        h = ((q @ k.mT + self.b).softmax(-1) @ v).view(w.shape)
        return self.l((h.transpose(0, 1) if self.windows_first else h).flatten(1, 2).mean(1))


class WindowConvolution(nn.Module):
    """Depthwise and grouped convolutions over folded windows of three positions."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv1d(FEATURES, FEATURES, 2, groups=FEATURES)
        self.g, self.l = nn.Conv1d(FEATURES, 4, 2, groups=2), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        w = x.unfold(1, 3, 1)  # (N, W, d, 3)
        return self.l(self.g(self.c(w.flatten(0, 1)).tanh()).view(*w.shape[:2], -1).tanh().mean(1))


class Packed(nn.Module):
    """pack_padded_sequence, a recurrent layer, and a layer on the packed rows."""

    def __init__(self, kind: type[nn.Module], *, before: bool = False) -> None:
        super().__init__()
        self.e = nn.Embedding(TOKENS, FEATURES, padding_idx=0)
        self.i = nn.Linear(FEATURES, FEATURES) if before else None
        self.r, self.a = kind(FEATURES, WIDTH, batch_first=True), nn.Linear(WIDTH, FEATURES)
        self.l = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        n = (x != 0).sum(1)
        packed = pack_padded_sequence(self.e(x), n, batch_first=True, enforce_sorted=False)
        if self.i is not None:
            packed = PackedSequence(self.i(packed.data).tanh(), *packed[1:])
        h = self.r(packed)[0]
        h = PackedSequence(torch.tanh(self.a(h.data)), *h[1:])
        return self.l(pad_packed_sequence(h, batch_first=True)[0].sum(1) / n[:, None])


class Unpadded(nn.Module):
    """Padding is taken out before the layers, as flash-attention's unpad_input does."""

    def __init__(self, norm: Callable[[], nn.Module] = nn.Identity) -> None:
        super().__init__()
        self.e, self.n = nn.Embedding(TOKENS, FEATURES, padding_idx=0), norm()
        self.a, self.l = nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        keep = x != 0
        n = keep.sum(1)
        h = torch.tanh(self.a(self.n(self.e(x[keep]))))
        own = torch.arange(len(x)).repeat_interleave(n)
        return self.l(h.new_zeros(len(x), WIDTH).index_add(0, own, h) / n[:, None])


class SortsByLength(nn.Module):
    """A cell over texts sorted by length: each step has fewer; then back into the old order."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.c = nn.Embedding(TOKENS, FEATURES), nn.GRUCell(FEATURES, WIDTH)
        self.l = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        n, order = (x != 0).sum(1).sort(descending=True)
        x = x[order]
        h = self.e.weight.new_zeros(len(x), WIDTH)
        for t in range(int(n[0])):
            live = int((n > t).sum())
            h = torch.cat([self.c(self.e(x[:live, t]), h[:live]), h[live:]])
        return self.l(h[order.argsort()])


class LastToken(Embeds):
    """The last token's state, of trimmed and folded texts: decoders as classifiers."""

    def forward(self, x: Tensor) -> Tensor:
        n = (x != 0).sum(1)
        h = self.e(x[:, : int(n.max())]).cumsum(1)
        h = self.b(torch.tanh(self.a(h.flatten(0, 1)))).unflatten(0, h.shape[:2])
        return self.l(h[torch.arange(len(x)), n - 1].tanh())


class OneStack(nn.Module):
    """Tokens with a class token and positions, cut to the longest, a tied head, both layouts."""

    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Embedding(TOKENS, FEATURES)
        self.cls = nn.Parameter(torch.randn(1, 1, FEATURES))
        self.p = nn.Parameter(torch.randn(1, 12, FEATURES))
        self.a, self.l = nn.Linear(FEATURES, FEATURES), nn.Linear(TOKENS, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        n = (x != 0).sum(1)
        x = x[:, : int(n.max())]
        h = torch.cat([self.cls.expand(len(x), -1, -1), self.e(x)], 1)
        h = torch.tanh(self.a((h + self.p[:, : h.shape[1]]).transpose(0, 1).flatten(0, 1)))
        h = self.a(h.view(-1, len(x), FEATURES).transpose(0, 1)).tanh()  # the same, examples first
        own = torch.arange(h.shape[1]) <= n[:, None]
        return self.l(F.linear((h * own[..., None]).sum(1), self.e.weight).tanh())


LAYOUTS = {
    "padding trimmed": Case(Trims),
    "folded by hand": Case(Folds),
    "time first": Case(TimeFirst, features, all_alike),
    "frames folded": Case(lambda: Video(False), images, all_alike, (3, 4)),
    "frames, time first": Case(lambda: Video(True), images, all_alike, (3, 4)),
    "frames, grouped": Case(lambda: Video(True, grouped=True), images, all_alike, (3, 4)),
    "examples before windows": Case(lambda: Windows(False), features, all_alike, (6, 8)),
    "windows before examples": Case(lambda: Windows(True), features, all_alike, (6, 8)),
    "convolution of windows": Case(WindowConvolution, features, all_alike),
    "packed LSTM": Case(lambda: Packed(nn.LSTM)),
    "packed GRU": Case(lambda: Packed(nn.GRU, before=True)),
    "unpadded": Case(Unpadded),
    "unpadded LayerNorm": Case(lambda: Unpadded(lambda: nn.LayerNorm(FEATURES))),
    "unpadded RMSNorm": Case(lambda: Unpadded(lambda: nn.RMSNorm(FEATURES))),
    "unpadded GroupNorm": Case(lambda: Unpadded(lambda: nn.GroupNorm(2, FEATURES))),
    "unpadded BatchNorm": Case(lambda: Unpadded(lambda: nn.BatchNorm1d(FEATURES))),
    "sorted by length": Case(SortsByLength),
    "last token": Case(LastToken),
    "class token, tied": Case(OneStack),
}
