"""FILIP's loss: every patch finds its best word, every word its best patch."""

import logging
import math
from dataclasses import replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from declip.data.batch import Needs
from declip.models.dual_encoder import DualEncoder
from declip.models.token_scorer import TokenScorer, token_similarity
from declip.recipe.schema import Recipe
from declip.supervision.contrastive import mean_in_blocks, to_float32
from declip.supervision.term import Encodings, Rows, Similarity, Term, require

log = logging.getLogger("declip")
warn_once = cache(log.warning)  # once per process, however often the model is built

NAME = "late_interaction"
HEAD = f"terms.{NAME}."  # beginning of the names of its tensors


def select_tokens(
    tokens: Tensor,
    paired_tokens: Tensor,
    k: int,
    mask: Tensor | None = None,
    paired_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Keep the k tokens of each sample that are most similar, in sum, to the paired sample's tokens.

    FILIP does this before it gathers, to move and compare less (arXiv 2111.07783). Equals the plain loop
        score[b, t] = Σ_u tokens[b, t]·paired_tokens[b, u];  keep the k largest of each b

    Args:
        tokens: (B, n, d) of one modality, L2-normalized.
        paired_tokens: (B, m, d) of the other modality of the same pairs, L2-normalized.
        mask: (B, n) bool, True where a token counts: others are taken last. None: all count.
        paired_mask: (B, m) bool, the same for `paired_tokens`.

    Returns:
        The kept tokens (B, min(k, n), d), with gradient, and the mask (B, min(k, n)) of those that count.
    """
    if mask is None:
        mask = tokens.new_ones(tokens.shape[:2], dtype=torch.bool)
    with torch.no_grad():
        paired = to_float32(paired_tokens)
        if paired_mask is not None:
            paired = paired * paired_mask.unsqueeze(-1)
        # The sum over u first: B·n·d multiplications.
        total = paired.sum(dim=1, keepdim=True)
        score = (to_float32(tokens) * total).sum(dim=-1)
        score = score.masked_fill(~mask, -torch.inf)
        best = score.topk(min(k, tokens.shape[1]), dim=1).indices
    kept = tokens.take_along_dim(best.unsqueeze(-1), dim=1)
    return kept, mask.take_along_dim(best, dim=1)


def late_interaction(
    image_tokens: Tensor,
    word_tokens: Tensor,
    word_mask: Tensor,
    image_keys: Tensor,
    word_keys: Tensor,
    word_key_mask: Tensor,
    scale: Tensor | float,
    offset: int = 0,
    include_padding: bool = False,
    max_logit_bytes: float | None = None,
) -> Tensor:
    """InfoNCE on token-wise similarities (FILIP, arXiv 2111.07783; in DeFILIP, arXiv 2203.05796).

    Equals the plain loop, y = offset + b
        i[b, n] = mean over patches p of max over words l of image_tokens[b, p]·word_keys[n, l]
        t[b, n] = mean over words l of max over patches p of word_tokens[b, l]·image_keys[n, p]
        ½ mean over b of [ logsumexpₙ(s·i[b, n]) - s·i[b, y] + logsumexpₙ(s·t[b, n]) - s·t[b, y] ]
    The projected, L2-normalized tokens are (B, P, d) patches and (B, L, d) words of this rank, as keys (N, K, d) and
    (N, M, d) of all ranks, with gradient, all or those of `select_tokens`. The masks are bool, False at padding.

    Args:
        scale: exp of this term's own logit scale.
        include_padding: Count padding like words, as the official implementation does; both masks are ignored.
        max_logit_bytes: Limit of the positions of maxima in each direction, see `mean_in_blocks`.
    """

    def one_way(
        tokens: Tensor, keys: Tensor, mask: Tensor | None, key_mask: Tensor | None
    ) -> Tensor:
        def loss(start: int, stop: int) -> Tensor:
            positives = torch.arange(offset + start, offset + stop, device=tokens.device)
            own = None
            if mask is not None:
                own = mask[start:stop]
            cosines = token_similarity(tokens[start:stop], keys, own, key_mask)
            return F.cross_entropy(scale * cosines, positives, reduction="sum")

        positions = tokens.shape[1] * len(keys)
        row_bytes = positions * torch.int64.itemsize
        return mean_in_blocks(loss, len(tokens), row_bytes, max_logit_bytes)

    # Patches have no padding.
    mask, key_mask = (None, None) if include_padding else (word_mask, word_key_mask)
    image_to_text = one_way(image_tokens, word_keys, None, key_mask)
    text_to_image = one_way(word_tokens, image_keys, mask, None)
    return (image_to_text + text_to_image) / 2


class LateInteraction(Term):
    """FILIP's loss between the patches of the first image view and the tokens of the first text view.

    It has its own projections and logit scale.
    """

    needs = Needs(tokens=True)
    compares_pairs = True
    title = "late interaction (FILIP)"
    explanation = "The contrastive loss on the best-matching patches and words."

    def __init__(self, recipe: Recipe, model: DualEncoder) -> None:
        super().__init__(recipe, model)
        self.section = recipe.late_interaction
        self.patch_projection = nn.Linear(model.image_tower.token_width, self.section.width)
        self.word_projection = nn.Linear(model.text_tower.width, self.section.width)
        self.logit_scale = nn.Parameter(torch.tensor(recipe.logit_scale.init))
        self.longest = self.section.top_k or model.text_tower.context
        self.min_scale = recipe.logit_scale.min
        self.compares_tokens = recipe.token_scoring is not None

    def attach(self, model: DualEncoder) -> None:
        """Let the model compare patches and words, if this loss alone is trained."""
        if self.compares_tokens:
            model.token_scorer = TokenScorer(HEAD, self, model, self.section.include_padding)
            warn_once(
                f"{NAME} alone does not train embeddings, which retrieval, linear probes, search and exports use; "
                "zero-shot evaluation compares patches with words. Set loss_weights.contrastive=1 to train embeddings."
            )

    @classmethod
    def needs_in(cls, recipe: Recipe) -> Needs:
        return replace(cls.needs, whole_context=recipe.late_interaction.include_padding)

    def features(self, encoded: Encodings) -> dict[str, Tensor]:
        patches = self.patch_projection(require(encoded.outputs.patches))
        words = self.word_projection(require(encoded.outputs.text_tokens))
        positions = torch.arange(words.shape[1], device=words.device)
        return {
            "patches": F.normalize(to_float32(patches), dim=-1),
            "words": F.normalize(to_float32(words), dim=-1),
            "word_mask": positions < encoded.outputs.lengths[:, None],
        }

    def keys(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        top_k = self.section.top_k
        if top_k is None:
            return features
        patches, words, mask = features.values()
        counted = None
        if not self.section.include_padding:
            counted = mask
        best_patches, _ = select_tokens(patches, words, top_k, paired_mask=counted)
        best_words, mask = select_tokens(words, patches, top_k, mask=counted)
        return {"patches": best_patches, "words": best_words, "word_mask": mask}

    def pad_keys(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        missing = self.longest - features["words"].shape[1]
        words = F.pad(features["words"], (0, 0, 0, missing))
        mask = F.pad(features["word_mask"], (0, missing))
        return features | {"words": words, "word_mask": mask}

    def loss(self, own: Rows, keys: Rows, similarity: Similarity, offset: int) -> Tensor:
        patches, words, mask = own.extra.values()
        image_keys, word_keys, key_mask = keys.extra.values()
        options = self.logit_scale.exp(), offset, self.section.include_padding, self.max_logit_bytes
        return late_interaction(patches, words, mask, image_keys, word_keys, key_mask, *options)

    def chance(self, batch_size: int) -> float:
        return math.log(batch_size)

    @torch.no_grad()
    def after_step(self, model: DualEncoder) -> None:
        if self.min_scale is not None:
            self.logit_scale.clamp_(min=self.min_scale)
