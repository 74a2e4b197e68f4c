"""A fitted model: frozen towers and two heads that map their features into one space."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from declip.closed_form.heads import Heads
from declip.data.pair import PairSource
from declip.data.text.tokenizer import CaptionTokenizer
from declip.errors import UserError
from declip.evaluation.encode import Batching, SourceFeatures
from declip.fitting.base import EncoderBase, linear_name
from declip.interchange.weights import Weights
from declip.models.dual_encoder import DualEncoder
from declip.models.encoder import Complete, Preprocessing
from declip.models.layers import PROJECTIONS
from declip.models.neighbors import NeighborProjection, neighbor_tensors

ROWS = 8_192  # images whose features are mapped at a time


@dataclass(frozen=True)
class Adapted(Complete):
    """An encoder of images and texts: the base's pooled features, mapped by the heads.

    Where the base has projections, the heads are maps of its embeddings; None keeps these.
    """

    base: EncoderBase
    heads: Heads | None
    factor: float  # of cosines before a softmax

    class_name = "Adapted"
    recipe = None
    token_scorer = None
    encode_backbone = None

    @property
    def device(self) -> torch.device:
        """Device of the base."""
        return self.base.device

    @property
    def logit_scale(self) -> Tensor:
        """Logarithm of the factor of cosines."""
        return torch.tensor(self.factor).log()

    @property
    def preprocessor(self) -> Preprocessing:
        """The base's preprocessing on the host."""
        return self.base.model.preprocessor

    @property
    def tokenizer(self) -> CaptionTokenizer | None:
        """The base's tokenizer."""
        return self.base.model.tokenizer

    def preprocess(self, images: list[Image.Image]) -> Tensor:
        """PIL images → (n, 3, S, S) normalized."""
        return self.base.model.preprocess(images)

    def tokenize(self, texts: list[str]) -> Tensor:
        """Texts → (m, L) token ids."""
        return self.base.model.tokenize(texts)

    def modules(self) -> Iterator[nn.Module]:
        """Modules of the base."""
        return self.base.model.modules()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the base."""
        return self.base.model.parameters()

    def state_dict(self) -> Mapping[str, Any]:
        """The tensors of the base, and the two matrices."""
        tensors = dict(self.base.model.state_dict())
        if self.heads is not None:
            tensors |= {"heads.image": self.heads.image, "heads.text": self.heads.text}
        return tensors

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(n, 3, S, S) normalized → (n, k) float32 of length 1."""
        return self._embed_images(self.base.pool_exact(pixels))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(m, L) token ids → (m, k) float32 of length 1."""
        pooled = self.base.pool_text(tokens)
        if self.heads is None:
            return pooled
        return self.heads.to(pooled).embed_texts(pooled)

    def source_features(self, source: PairSource, how: Batching) -> SourceFeatures:
        """Features of the images of a source, which the base reads once for all heads."""
        pooled = self.base.pool_source(source, how)
        parts = [self._embed_images(part) for part in pooled.images.split(ROWS)]
        return replace(pooled, images=torch.cat(parts))

    def _embed_images(self, pooled: Tensor) -> Tensor:
        if self.heads is None:
            return pooled
        return self.heads.to(pooled).embed_images(pooled)

    def merged(self) -> DualEncoder:
        """The same model with the heads in place of the towers' projections."""
        model = self.weights().build()
        return model.to(self.base.device).eval()

    def weights(self) -> Weights:
        """The weights of the merged model."""
        model = self._towers
        tensors = dict(model.state_dict())
        recipe = model.recipe
        if self.heads is not None:
            kept = {n: t for n, t in tensors.items() if not n.startswith(PROJECTIONS)}
            tensors = kept | self.projections()
            recipe = recipe.with_keys({"embed_dim": self._width})
        on_host = {name: tensor.cpu() for name, tensor in tensors.items()}
        return Weights(recipe, on_host, self.base.name)

    @property
    def _towers(self) -> DualEncoder:
        model = self.base.model
        if not isinstance(model, DualEncoder):
            raise UserError(
                f"{model.class_name} is not a model of declip, so heads cannot replace its projections. Use the "
                "fitted model as it is, or fit to one that `declip.load` returned."
            )
        return model

    @property
    def _width(self) -> int:
        """Dimensions of the shared space."""
        assert self.heads is not None, "the base keeps its projections"
        neighbors = self.heads.neighbors
        if neighbors is None or neighbors.axes is None:
            return len(self.heads.image)
        return neighbors.axes.shape[1]

    @torch.no_grad()
    def projections(self) -> dict[str, Tensor]:
        """The tensors that replace the projections, and the logit scale, by the names of `DualEncoder`."""
        assert self.heads is not None, "the base keeps its projections"
        known = self.heads.neighbors
        first_image, first_text = self.base.projections
        image = self._projection(self.heads.image, first_image)
        text = self._projection(self.heads.text, first_text)
        classifier = self.heads.classifier
        if classifier is not None:
            image |= {"classes": classifier.rows.float(), "direction": classifier.direction.float()}
        if known is not None:
            image = neighbor_tensors(image, known.images, known)
            text = neighbor_tensors(text, known.texts, known)
        tensors = {"logit_scale": self.logit_scale.float()}
        for prefix, own in zip(PROJECTIONS, (image, text), strict=True):
            for name, tensor in own.items():
                # A file holds no shared ones
                tensors[f"{prefix}{name}"] = tensor.cpu().clone().contiguous()
        return tensors

    def _projection(self, rows: Tensor, first: Any) -> dict[str, Tensor]:
        """The tensors of one projection: of the rows (k, v), after the base's where it has one."""
        rows = rows.float()
        if first is None:
            return {"weight": rows}
        if not self.base.projected:
            tensors = {"weight": rows}
            if first.bias is not None:
                tensors["bias"] = torch.zeros(len(rows))
            return tensors
        own = {name: tensor.cpu() for name, tensor in first.state_dict().items()}
        if isinstance(first, NeighborProjection):
            return own | {"axes": own["axes"] @ rows.mT}
        if isinstance(first, nn.Identity):
            return {"weight": rows}
        linear = linear_name(first)
        bias = f"{linear}bias"
        if bias in own:
            own[bias] = rows @ own[bias]
        return own | {f"{linear}weight": rows @ own[f"{linear}weight"]}
