"""Networks of the field that go different ways for different examples: experts, branches, trees.

Each is right one example at a time, which is how its true gradients are made.

Axis letters: N examples, T positions, d features, E experts, C capacity.
"""

from __future__ import annotations

import torch
from field_truth import CLASSES, FEATURES, TOKENS, WIDTH, Case, graphs, routes_of, text
from torch import Tensor, nn
from torch.nn import functional as F

EXPERTS = 3


def means(n: int, longest: int, seed: int) -> Tensor:
    """(N, d) of noise, of another scale for others: `longest` is no length here."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, FEATURES, generator=generator) * longest / 6


class Experts(nn.Module):
    """One expert an example: the rows of an expert are taken out and added back."""

    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Linear(FEATURES, EXPERTS)
        self.e = nn.ModuleList(nn.Linear(FEATURES, WIDTH) for _ in range(EXPERTS))
        self.o = nn.Linear(WIDTH, CLASSES)

    def route(self, x: Tensor) -> Tensor:
        return self.g(x).argmax(1)

    def forward(self, x: Tensor) -> Tensor:
        p, i = self.g(x).softmax(-1).max(-1)
        h = x.new_zeros(len(x), WIDTH)
        for k, expert in enumerate(self.e):
            rows = (i == k).nonzero().squeeze(1)
            if len(rows):
                h = h.index_add(0, rows, expert(x[rows]) * p[rows, None])
        return self.o(h.tanh())


class TopTwo(nn.Module):
    """The two best of four experts for each token, as Mixtral's reference has them."""

    def __init__(self) -> None:
        super().__init__()
        self.t, self.g = nn.Embedding(TOKENS, FEATURES), nn.Linear(FEATURES, 4, bias=False)
        self.e = nn.ModuleList(
            nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.SiLU(), nn.Linear(WIDTH, FEATURES))
            for _ in range(4)
        )
        self.o = nn.Linear(FEATURES, CLASSES)

    def route(self, x: Tensor) -> Tensor:
        return self.g(self.t(x[:, 0])).argmax(1)

    def forward(self, x: Tensor) -> Tensor:
        keep = (x != 0).to(self.o.weight.dtype)
        z = self.t(x).view(-1, FEATURES)
        p, chosen = self.g(z).softmax(-1).topk(2, -1)
        p = p / p.sum(-1, keepdim=True)
        out = torch.zeros_like(z)
        for k, expert in enumerate(self.e):
            rows, which = torch.where(chosen == k)
            out.index_add_(0, rows, expert(z[rows]) * p[rows, which, None])
        h = out.view(*x.shape, -1) * keep[..., None]
        return self.o(h.sum(1) / keep.sum(1, keepdim=True))


class Capacity(nn.Module):
    """Tokens are sent to places of experts by one-hot products, (E, C, d), as in GShard.

    Args:
        of_all: places are counted over the whole batch, else in each example, (E, N, C, d).
    """

    def __init__(self, of_all: bool) -> None:
        super().__init__()
        self.of_all = of_all
        self.t, self.g = nn.Embedding(TOKENS, FEATURES), nn.Linear(FEATURES, EXPERTS)
        self.w = nn.Parameter(torch.randn(EXPERTS, FEATURES, WIDTH) / 2)
        self.v = nn.Parameter(torch.randn(EXPERTS, WIDTH, FEATURES) / 2)
        self.o = nn.Linear(FEATURES, CLASSES)

    def route(self, x: Tensor) -> Tensor:
        return self.g(self.t(x[:, 0])).argmax(1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.t(x)
        z = z.flatten(0, 1)[None] if self.of_all else z  # (groups, S, d)
        gate, i = self.g(z).softmax(-1).max(-1)
        mine = F.one_hot(i, EXPERTS)
        place = ((mine.cumsum(1) - 1) * mine).sum(-1)
        places = F.one_hot(place, z.shape[1])
        sent = torch.einsum("nse,nsc->nsec", mine, places).to(z.dtype)
        h = torch.einsum("nsec,nsd->encd", sent, z)
        h = torch.einsum("encd,edw->encw", h, self.w).tanh()
        h = torch.einsum("encw,ewd->encd", h, self.v)
        h = torch.einsum("nsec,encd,ns->nsd", sent, h, gate).reshape(*x.shape, -1)
        return self.o(h.tanh().mean(1))


class Gathered(nn.Module):
    """Each example's own expert weights are taken out: `w[i]`, then one product an example."""

    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Linear(FEATURES, EXPERTS)
        self.w = nn.Parameter(torch.randn(EXPERTS, FEATURES, WIDTH))
        self.b = nn.Parameter(torch.randn(EXPERTS, WIDTH))
        self.o = nn.Linear(WIDTH, CLASSES)

    def route(self, x: Tensor) -> Tensor:
        return self.g(x).argmax(1)

    def forward(self, x: Tensor) -> Tensor:
        p, i = self.g(x).softmax(-1).max(-1)
        h = (x[:, None] @ self.w[i]).squeeze(1) + self.b[i]
        return self.o(h.tanh() * p[:, None])


class Stacked(Gathered):
    """All experts in one product, (E, N, d) @ (E, d, w): experts first."""

    def forward(self, x: Tensor) -> Tensor:
        p = self.g(x).softmax(-1)
        h = torch.baddbmm(self.b[:, None], x.expand(EXPERTS, -1, -1), self.w).tanh()
        return self.o((h * p.T[..., None]).sum(0))


class SortedToExperts(Gathered):
    """Rows sorted by expert, and a part of them to each: as grouped products take them."""

    def forward(self, x: Tensor) -> Tensor:
        p, i = self.g(x).softmax(-1).max(-1)
        order = i.argsort(stable=True)
        parts = x[order].split(torch.bincount(i, minlength=EXPERTS).tolist())
        h = torch.cat([z @ self.w[k] + self.b[k] for k, z in enumerate(parts) if len(z)])
        return self.o(h[order.argsort()].tanh() * p[:, None])


class SometimesOn(nn.Module):
    """A layer for the rows that need it, left out where no row does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.extra = nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.o = nn.Linear(WIDTH, CLASSES)

    def route(self, x: Tensor) -> Tensor:
        return (x[:, 0] > 0).long()

    def forward(self, x: Tensor) -> Tensor:
        h, need = self.a(x).tanh(), x[:, 0] > 0
        if need.any():
            h = h.masked_scatter(need[:, None], self.extra(h[need]).tanh())
        return self.o(h)


class LeavesEarly(nn.Module):
    """Examples that are sure leave after a block; the others go on."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(FEATURES, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(WIDTH, CLASSES) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h, at = self.a(x).tanh(), torch.arange(len(x))
        out = x.new_zeros(len(x), CLASSES)
        for depth, (block, head) in enumerate(zip(self.blocks, self.heads, strict=True)):
            h = block(h).tanh()
            left = self.route(x)[at] == depth
            out = out.index_put((at[left],), head(h[left]))
            h, at = h[~left], at[~left]
            if not len(at):
                break
        return out

    def route(self, x: Tensor) -> Tensor:
        return (x[:, 0].abs() > 0.4).long() + (x[:, 0].abs() > 1).long()


class Trees(nn.Module):
    """Leaves are joined two by two till one node is left, each text by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.c = nn.Embedding(TOKENS, FEATURES), nn.Linear(2 * FEATURES, FEATURES)
        self.o = nn.Linear(FEATURES, CLASSES)

    def tree(self, ids: Tensor) -> Tensor:
        nodes = list(self.e(ids))
        while len(nodes) > 1:
            pairs = zip(nodes[::2], nodes[1::2], strict=False)
            joined = [self.c(torch.cat(pair)).tanh() for pair in pairs]
            nodes = joined + nodes[len(nodes) - len(nodes) % 2 :]
        return nodes[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.stack([self.tree(ids[ids != 0]) for ids in x]))


class TreesByLevel(Trees):
    """The same, a level of all trees at once: so many pairs as the batch has."""

    def forward(self, x: Tensor) -> Tensor:
        nodes = [list(self.e(ids[ids != 0])) for ids in x]
        while any(len(own) > 1 for own in nodes):
            pairs = [p for own in nodes for p in zip(own[::2], own[1::2], strict=False)]
            joined = iter(self.c(torch.stack([torch.cat(pair) for pair in pairs])).tanh())
            nodes = [
                [next(joined) for _ in range(len(own) // 2)] + own[len(own) - len(own) % 2 :]
                for own in nodes
            ]
        return self.o(torch.stack([own[0] for own in nodes]))


class Graph(nn.Module):
    """Messages along the edges of all graphs as one graph of many parts."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.m = nn.Embedding(TOKENS, FEATURES), nn.Linear(2 * FEATURES, FEATURES)
        self.u, self.o = nn.Linear(2 * FEATURES, FEATURES), nn.Linear(FEATURES, CLASSES)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        keep = nodes != 0
        count = keep.sum(1)
        first = count.cumsum(0) - count
        h, real = self.e(nodes[keep]), edges[..., 0] >= 0
        source, target = (edges + first[:, None, None])[real].T
        for _ in range(2):
            message = self.m(torch.cat([h[source], h[target]], 1)).tanh()
            come = torch.zeros_like(h).index_add(0, target, message)
            h = self.u(torch.cat([h, come], 1)).tanh()
        own = torch.arange(len(nodes)).repeat_interleave(count)
        pooled = h.new_zeros(len(nodes), FEATURES).index_add(0, own, h)
        return self.o(pooled / count[:, None])


class Buckets(nn.Module):
    """Texts of one length together, a batch for each length."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.a = nn.Embedding(TOKENS, FEATURES), nn.Linear(FEATURES, WIDTH)
        self.l = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        n = (x != 0).sum(1)
        out = self.l.weight.new_zeros(len(x), CLASSES)
        for length in n.unique().tolist():
            rows = (n == length).nonzero().squeeze(1)
            h = self.a(self.e(x[rows, :length])).tanh().mean(1)
            out = out.index_copy(0, rows, self.l(h))
        return out


class Distinct(Buckets):
    """Each token of the batch is looked at once, however many texts have it."""

    def forward(self, x: Tensor) -> Tensor:
        ids, where = x.unique(return_inverse=True)
        h = self.a(self.e(ids)).tanh()[where] * (x != 0)[..., None]
        return self.l(h.sum(1) / (x != 0).sum(1, keepdim=True))


class Pieces(Buckets):
    """The batch is cut in pieces of five, to save memory, and put together again."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.l(self.a(self.e(z)).tanh().mean(1)) for z in x.split(5)])


ROUTES = {
    "an expert an example": Case(Experts, means, routes_of),
    "two experts a token": Case(TopTwo, text, routes_of),
    "places of an example": Case(lambda: Capacity(False), text, routes_of),
    "places of all": Case(lambda: Capacity(True), text, routes_of),
    "gathered weights": Case(Gathered, means, routes_of),
    "stacked weights": Case(Stacked, means, routes_of),
    "sorted to experts": Case(SortedToExperts, means, routes_of),
    "a branch for some": Case(SometimesOn, means, routes_of),
    "some leave early": Case(LeavesEarly, means, routes_of),
    "trees": Case(Trees),
    "trees by level": Case(TreesByLevel),
    "graphs": Case(Graph, graphs),
    "a batch for each length": Case(Buckets),
    "distinct tokens": Case(Distinct),
    "pieces of the batch": Case(Pieces),
}
