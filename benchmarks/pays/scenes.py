"""Experiment 3, rendering and measures: scenes of 3 to 5 emoji on textured ground, with boxes.

    python scenes.py draw scenes.png          # ten scenes
    python scenes.py measure MODEL            # pointing, patch mIoU and R@10 on 500 scenes of the test designer

`Scenes("emoji", 20_000)` is a source for `declip.train(recipe, data=…)`; scene i depends on (seed, i) alone.
"""

import math
import sys

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch.nn.functional import interpolate, normalize

from declip.data.builtin import open_builtin

SIDE, LEAST, MOST = 96, 22, 40  # pixels of a scene and of an object


class Scenes:
    """Items (image, captions) for declip, and boxes: name → (left, top, right, bottom)."""

    def __init__(self, origin="emoji", count=20_000, seed=0):
        self.source, self.count, self.seed = open_builtin(origin), count, seed
        self.by_design = {}
        for i, row in enumerate(self.source.rows):
            self.by_design.setdefault(row["design"], []).append(i)

    def __len__(self):
        return self.count

    def scene(self, index):
        rng = np.random.default_rng((self.seed, index))
        # --- ground: two colors mixed by blurred noise
        noise = Image.fromarray(rng.integers(0, 256, (SIDE, SIDE), np.uint8)).filter(ImageFilter.GaussianBlur(rng.uniform(1, 6)))
        mix = np.asarray(noise, np.float32)[..., None]
        mix = (mix - mix.min()) / max(1.0, float(mix.max() - mix.min()))
        a, b = rng.integers(90, 256, 3), rng.integers(90, 256, 3)
        image = Image.fromarray((a + (b - a) * mix).astype(np.uint8))
        # --- objects of one designer that do not overlap
        rows = self.by_design[list(self.by_design)[rng.integers(len(self.by_design))]]
        boxes = {}
        for row in rng.choice(rows, int(rng.integers(3, 6)), replace=False):
            name = self.source.captions(int(row))[0]
            for _ in range(30):
                side = int(rng.integers(LEAST, MOST + 1))
                left, top = (int(rng.integers(0, SIDE - side + 1)) for _ in range(2))
                box = (left, top, left + side, top + side)
                if name not in boxes and all(box[2] <= o[0] or o[2] <= box[0] or box[3] <= o[1] or o[3] <= box[1] for o in boxes.values()):
                    drawing = self.source.image(int(row)).resize((side, side), Image.Resampling.LANCZOS)
                    # White is transparent: sets are drawn over white
                    mask = drawing.convert("L").point(lambda v: 255 if v < 245 else 0)
                    image.paste(drawing, (left, top), mask)
                    boxes[name] = box
                    break
        return image, boxes, rng

    def __getitem__(self, index):
        image, boxes, rng = self.scene(index)
        names = list(rng.permutation(list(boxes)))
        one, two = names[:2] if len(names) > 1 else (names[0], names[0])
        (x, y, *_), (u, v, *_) = boxes[one], boxes[two]
        place = ("left of" if x < u else "right of") if abs(x - u) > abs(y - v) else ("above" if y < v else "below")
        return image, [", ".join(names), f"a {one} {place} a {two}"]


@torch.no_grad()
def measure(model, scenes, count=500):
    """Pointing (is the best place in the box), mIoU of the best places, as many as the box has, and R@10 text to image."""
    model.eval()
    point, iou, images, queries = [], [], [], []
    for index in range(count):
        image, boxes, _ = scenes.scene(index)
        pixels = model.preprocess(image)
        cells = model.image_tower.encode_cells(pixels)[0].float()
        images.append(model.encode_image(pixels)[0])
        texts = model.encode_text(model.tokenize(list(boxes)))
        side = math.isqrt(len(cells))
        maps = interpolate((cells @ texts.mT).mT.view(1, -1, side, side), (SIDE, SIDE), mode="bilinear")[0]
        for found, (name, (left, top, right, bottom)) in zip(maps, boxes.items(), strict=True):
            y, x = divmod(int(found.argmax()), SIDE)
            point.append(left <= x < right and top <= y < bottom)
            inside = torch.zeros(SIDE, SIDE, dtype=torch.bool)
            inside[top:bottom, left:right] = True
            best = found >= found.flatten().topk(int(inside.sum())).values[-1]
            iou.append(float((best & inside).sum() / (best | inside).sum()))
        queries += [(index, text) for text in texts[:1]]
    images = normalize(torch.stack(images), dim=-1)
    hits = [index in (images @ text).topk(10).indices.tolist() for index, text in queries]
    return {"pointing": np.mean(point), "mIoU": np.mean(iou), "R@10": np.mean(hits), "n": len(point)}


if sys.argv[1] == "draw":
    paper = Image.new("RGB", (5 * 200, 2 * 220), "white")
    pen, scenes = ImageDraw.Draw(paper), Scenes("emoji" if len(sys.argv) < 4 else sys.argv[3])
    for i in range(10):
        image, captions = scenes[i]
        image, boxes, _ = scenes.scene(i)
        big = image.resize((192, 192))
        for box in boxes.values():
            ImageDraw.Draw(big).rectangle([2 * v for v in box], outline="black")
        paper.paste(big, (200 * (i % 5), 220 * (i // 5)))
        pen.text((200 * (i % 5), 220 * (i // 5) + 194), captions[1][:34], fill="black")
    paper.save(sys.argv[2])
else:
    import declip

    print(measure(declip.load(sys.argv[2]), Scenes("emoji-test", 500, seed=1), int(sys.argv[3]) if len(sys.argv) > 3 else 500))
