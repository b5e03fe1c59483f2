"""The same detector with fewer products: what an image's few normal tokens do to a matrix is done to the matrix once.

A decoder layer looks at M normal tokens. Projecting them to values, mixing, and projecting every patch again costs
N C^2; projecting the M tokens of each head first costs N (heads M) C. The extractor's queries are learned, not looked
up: keys and values of all N patches are never needed, only the queries brought to the side of the patches, and the
patches that they gathered. Both are exact but for rounding.

Source: linear algebra; METHOD section 5.
"""

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from semwatch_training.families.ni.ni_detector import DetectorGraph, GuidedDecoderLayer, NormalExtractor, split_heads


def folded(graph: DetectorGraph) -> DetectorGraph:
    """The same answers with fewer products, over the same trunks; a detector that is a branch alone stays as it is."""
    if graph.detector.form.evidence == "branch":
        return graph
    detector = copy.deepcopy(graph.detector)
    detector.extractor = cast(Any, FoldedExtractor(detector.extractor))
    detector.decoder = nn.ModuleList(FoldedDecoderLayer(cast(GuidedDecoderLayer, each)) for each in detector.decoder)
    return DetectorGraph(graph.trunk, detector, graph.evidence.trunk if graph.evidence is not None else None).eval()


class FoldedExtractor(nn.Module):
    """``NormalExtractor`` without keys and values of the patches."""

    def __init__(self, extractor: NormalExtractor) -> None:
        super().__init__()
        C, heads = extractor.proj.in_features, extractor.heads
        self.heads, self.norm1, self.norm2, self.mlp = heads, extractor.norm1, extractor.norm2, extractor.mlp
        self.proj, self.queries = extractor.proj, extractor.queries
        key, value = extractor.to_kv.weight.chunk(2)
        self.value_bias = nn.Parameter(extractor.to_kv.bias.chunk(2)[1].clone(), requires_grad=False)
        with torch.no_grad():
            q = split_heads(extractor.to_q(extractor.norm1(extractor.queries)), heads)[0]  # (heads, M, d)
            # A key's bias adds the same to a query's every logit, and softmax takes it out again.
            looks = q @ key.reshape(heads, C // heads, C) * (C // heads) ** -0.5
            self.looks = nn.Parameter(looks.reshape(-1, C), requires_grad=False)  # (heads M, C)
        self.values = nn.Parameter(value.reshape(heads, C // heads, C).transpose(1, 2).clone(), requires_grad=False)

    def forward(self, fused: Tensor) -> Tensor:
        """Gather fused features (B, N, C) into normal tokens (B, M, C)."""
        B, _, C = fused.shape
        patches = self.norm1(fused)
        weights = (self.looks @ patches.transpose(1, 2)).softmax(dim=-1)  # (B, heads M, N)
        gathered = (weights @ patches).reshape(B, self.heads, -1, C) @ self.values  # (B, heads, M, d)
        merged = gathered.transpose(1, 2).reshape(B, -1, C) + self.value_bias
        tokens = self.queries + self.proj(merged)
        return cast(Tensor, tokens + self.mlp(self.norm2(tokens)))


class FoldedDecoderLayer(nn.Module):
    """``GuidedDecoderLayer`` whose projection is done to the values of the normal tokens."""

    def __init__(self, layer: GuidedDecoderLayer) -> None:
        super().__init__()
        C = layer.proj.in_features
        self.heads, self.literal, self.scale = layer.heads, layer.literal, layer.scale
        self.norm1, self.norm2, self.mlp = layer.norm1, layer.norm2, layer.mlp
        self.to_q, self.to_k, self.to_v = layer.to_q, layer.to_k, layer.to_v
        # (heads, d, C): what the projection makes of each head's part.
        self.parts = nn.Parameter(layer.proj.weight.T.reshape(self.heads, C // self.heads, C).clone(), False)
        self.bias = nn.Parameter(layer.proj.bias.clone(), requires_grad=False)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Rebuild x (B, N, C) from the normal tokens (B, M, C)."""
        B, N, C = x.shape
        queries, tokens = self.norm1(x), self.norm1(tokens)
        q, k, v = (split_heads(y, self.heads) for y in (self.to_q(queries), self.to_k(tokens), self.to_v(tokens)))
        if self.literal:
            weights = functional.relu(q @ k.transpose(-2, -1))
        else:
            q, k = functional.normalize(q, dim=-1, eps=1e-6), functional.normalize(k, dim=-1, eps=1e-6)
            weights = functional.relu(q @ k.transpose(-2, -1) * self.scale)
        projected = (v @ self.parts).reshape(B, -1, C)  # (B, heads M, C)
        rebuilt = weights.transpose(1, 2).reshape(B, N, -1) @ projected + self.bias
        return cast(Tensor, rebuilt + self.mlp(self.norm2(rebuilt)))
