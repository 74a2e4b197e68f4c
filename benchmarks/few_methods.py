"""Methods for few pairs: each takes a task and its settings, and returns maps into one space."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from declip.closed_form.choice import choose_heads
from declip.closed_form.heads import fit_heads
from declip.closed_form.pairs import ClassPairs, FitData, Pairs
from declip.closed_form.regression import centered, regression_rows
from declip.closed_form.related import choose_neighbors, known_pairs
from declip.closed_form.solve import Form

WIDTH = 512  # of the space that the trained peers learn

Embed = Callable[[Tensor], Tensor]


class Towers(NamedTuple):
    """What a method learned: maps of image features (n, v) and of text features (m, w) into one space."""

    image: Embed
    text: Embed


class Task(NamedTuple):
    """Training pairs with the groups that belong together, and the classifier of the image tower."""

    pairs: Pairs
    groups: np.ndarray
    classes: ClassPairs | None
    # Classes (n, k) → (n, w) text features of their names in a row
    names: Callable[[Tensor], Tensor] | None
    seed: int
    embedded: bool = False  # the features are embeddings of a start that has projections


Method = Callable[..., Towers]


def declip(task: Task, neighbors: bool = True) -> Towers:
    """`declip finetune`: forms, weights of classes and neighbors are chosen by cross-validation inside."""
    data = FitData.of(
        task.pairs, task.groups, task.classes, one_space=task.embedded, seed=task.seed
    )
    related = neighbors and not task.embedded and len(task.pairs.images) > 0
    choice = choose_heads(data, keep_start=not related)
    if related:
        choice = choose_neighbors(choice, data)
    heads = choice.heads.to(torch.zeros(1))
    return Towers(heads.embed_images, heads.embed_texts)


def declip_without_neighbors(task: Task) -> Towers:
    """`declip finetune` without neighbors, as it was before."""
    return declip(task, neighbors=False)


def asif(task: Task, classes: bool) -> Towers:
    """ASIF (arXiv 2210.01738): which known pairs an image and a caption resemble, and nothing else."""
    known = known_pairs(task.pairs, task.classes if classes else None, task.seed)
    one = torch.tensor([1.0, 0.0])
    return Towers(
        lambda images: known.images.features(images, known.classes, one),
        lambda texts: known.texts.features(texts, known.classes, one),
    )


def csa(task: Task, ridge: float, classes: bool) -> Towers:
    """CSA (arXiv 2410.07610): canonical correlation with a penalty."""
    known = (
        task.classes._replace(posteriors=False) if classes and task.classes is not None else None
    )
    heads = fit_heads(task.pairs, known, 1.0 if classes else 0.0, Form("cca", ridge))
    heads = heads.to(torch.zeros(1))
    return Towers(heads.embed_images, heads.embed_texts)


def procrustes(task: Task, width: int) -> Towers:
    """The rotation that brings both sides together, in their leading directions."""
    texts = task.pairs.mean_texts()
    sides = []
    for rows in (task.pairs.images, texts):
        mean = rows.mean(dim=0)
        count = min(width, len(rows) - 1)
        axes = torch.linalg.svd(rows - mean, full_matrices=False).Vh[:count].mT
        sides.append((mean, axes))
    (x_mean, x_axes), (y_mean, y_axes) = sides
    cross = ((task.pairs.images - x_mean) @ x_axes).mT @ ((texts - y_mean) @ y_axes)
    left, _, right = torch.linalg.svd(cross)
    return Towers(
        lambda images: (images - x_mean) @ x_axes @ left,
        lambda own: (own - y_mean) @ y_axes @ right.mT,
    )


def declip_linear(task: Task) -> Towers:
    """`declip finetune` without class posteriors, as it was before and as other formats hold it."""
    classes = task.classes and task.classes._replace(posteriors=False)
    return declip(task._replace(classes=classes), neighbors=False)


def declip_own_pairs(task: Task) -> Towers:
    """`declip finetune … finetune.class_pairs=false`."""
    return declip(task._replace(classes=None))


def start(task: Task) -> Towers:
    """The embeddings of the start as they are."""
    return Towers(unit, unit)


def regression(model: Any, task: Task) -> Towers:
    """Fit a scikit-learn regressor of text features on image features; both are compared without the texts' mean."""
    texts, owners = unit(task.pairs.texts), task.pairs.owners
    model.fit(unit(task.pairs.images)[owners].numpy(), texts.numpy())
    mean = texts.mean(dim=0)
    return Towers(
        lambda images: torch.from_numpy(model.predict(unit(images).numpy())).float() - mean,
        lambda rows: unit(rows) - mean,
    )


def ridge(task: Task, alpha: float) -> Towers:
    """scikit-learn's Ridge."""
    from sklearn.linear_model import Ridge

    return regression(Ridge(alpha=alpha), task)


def ridge_with_classes(task: Task, alpha: float) -> Towers:
    """scikit-learn's Ridge on the pairs and on the classifier's rows with the names and definitions of its classes."""
    from sklearn.linear_model import Ridge

    assert task.classes is not None
    rows = regression_rows(task.pairs, task.classes._replace(posteriors=False), 1.0)
    texts, model = unit(rows.texts), Ridge(alpha=alpha)
    model.fit(
        rows.images[rows.owners].float().numpy(), texts.numpy(), sample_weight=rows.weights.numpy()
    )
    mean = texts.mean(dim=0)

    def embed(images: Tensor) -> Tensor:
        features = centered(images.double(), rows.direction)[0].float()
        return torch.from_numpy(model.predict(features.numpy())).float() - mean

    return Towers(embed, lambda own: unit(own) - mean)


def class_names(task: Task, count: int) -> Towers:
    """The names of an image's best classes, as a text for the sentence encoder."""
    assert task.classes is not None
    assert task.names is not None
    rows, names = task.classes.rows, task.names
    return Towers(lambda images: names((images @ rows.mT).topk(count).indices), unit)


def conse(task: Task, count: int) -> Towers:
    """ConSE (arXiv 1312.5650): features of the names of an image's best classes, weighted by their probabilities."""
    assert task.classes is not None
    rows, names = task.classes.rows, unit(task.classes.texts[: len(task.classes.rows)])

    def embed(images: Tensor) -> Tensor:
        best = (images @ rows.mT).softmax(dim=1).topk(count)
        return torch.einsum("nk,nkw->nw", best.values, names[best.indices])

    return Towers(embed, unit)


def pls(task: Task, directions: int) -> Towers:
    """scikit-learn's PLSRegression."""
    from sklearn.cross_decomposition import PLSRegression

    return regression(PLSRegression(min(directions, len(task.pairs.images) - 1), scale=False), task)


def open_clip(task: Task, lr: float, epochs: int) -> Towers:
    """open_clip's ClipLoss and AdamW on projections of locked towers (LiT on both sides)."""
    from open_clip.loss import ClipLoss

    torch.manual_seed(task.seed)
    image, text = (nn.Linear(side.shape[1], WIDTH, bias=False) for side in task.pairs[:2])
    scale, loss = nn.Parameter(torch.tensor(np.log(1 / 0.07))), ClipLoss()
    optimizer = torch.optim.AdamW(
        [*image.parameters(), *text.parameters(), scale], lr, (0.9, 0.98), 1e-6, 0.1
    )
    train(task, epochs, optimizer, lambda x, y: loss(unit(image(x)), unit(text(y)), scale.exp()))
    return Towers(image, text)


def sentence_transformers(task: Task, lr: float, epochs: int) -> Towers:
    """sentence-transformers' MultipleNegativesRankingLoss, both directions, on a dense layer for each modality."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Dense

    torch.manual_seed(task.seed)
    layers = (
        Dense(side.shape[1], WIDTH, bias=False, activation_function=nn.Identity())
        for side in task.pairs[:2]
    )
    router = Features(*layers)
    loss = MultipleNegativesRankingLoss(
        SentenceTransformer(modules=[router], device="cpu"),
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )
    optimizer = torch.optim.AdamW(router.parameters(), lr)
    train(task, epochs, optimizer, lambda x, y: loss([{"image": x}, {"text": y}], None))
    return Towers(
        lambda rows: router({"image": rows})["sentence_embedding"],
        lambda rows: router({"text": rows})["sentence_embedding"],
    )


class Features(nn.Module):
    """A router of sentence-transformers over features that were computed before: a layer for each modality."""

    def __init__(self, image: nn.Module, text: nn.Module) -> None:
        super().__init__()
        self.image, self.text = image, text

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Encode a batch of one modality."""
        ((name, rows),) = batch.items()
        return getattr(self, name)({"sentence_embedding": unit(rows)})


def train(
    task: Task,
    epochs: int,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Take the steps of all epochs, with a learning rate that falls as a cosine."""
    steps = list(batches(task, epochs))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(steps))
    for images, texts in steps:
        optimizer.zero_grad()
        loss(images, texts).backward()
        optimizer.step()
        schedule.step()


def batches(task: Task, epochs: int, size: int = 128) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of unit features; each image with one of its captions, drawn again in every epoch."""
    images, texts, owners = unit(task.pairs.images), unit(task.pairs.texts), task.pairs.owners
    rng = np.random.default_rng(task.seed)
    captions = [np.flatnonzero(owners.numpy() == image) for image in range(len(images))]
    size = min(size, len(images))
    for _ in range(epochs):
        order = rng.permutation(len(images))
        for start in range(0, len(order) - size + 1, size):
            chosen = order[start : start + size]
            yield images[chosen], texts[[rng.choice(captions[image]) for image in chosen]]


def unit(rows: Tensor) -> Tensor:
    """Rows of unit length."""
    return normalize(rows, dim=-1)
