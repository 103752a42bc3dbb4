"""The published loop, written out naively: images rolled and flipped as tensors, every patch embedded by the model's own convolution, tokens gathered
after the position embedding, everything differentiated by autograd. In float64 the package must make the same images.
"""

import torch
import torch.nn.functional as F

import smi
from smi.inversion import augmentation
from smi.models.vit import describe
from tests.conftest import small_vit

ITERATIONS = 60
DIVISION = 3
PRUNE_AT = [10, 20, 40]


def naive_total_variation(x):
    one = (x[:, :, :, :-1] - x[:, :, :, 1:]).norm()
    two = (x[:, :, :-1, :] - x[:, :, 1:, :]).norm()
    three = (x[:, :, :-1, :-1] - x[:, :, 1:, 1:]).norm()
    four = (x[:, :, 1:, :-1] - x[:, :, :-1, 1:]).norm()
    return one + two + three + four


def naive_forward(model, x, kept, dy, dx, flip):
    """Logits and the CLS row on the patches `kept` (a list of cells per image) of the augmented image."""
    p = model.patch_embed.patch_size[0]
    rows, columns = model.patch_embed.grid_size
    x = torch.roll(x, (dy, dx), (2, 3))
    if flip:
        x = torch.flip(x, (3,))
    tokens = model.patch_embed(x) + model.pos_embed[:, 1:]
    cls = (model.cls_token + model.pos_embed[:, :1]).expand(len(x), -1, -1)
    sequences = []
    for image, cells in enumerate(kept):
        moved = []
        for cell in cells:
            row, column = divmod(cell, columns)
            row = (row + int(torch.floor(torch.tensor(dy / p + 0.5)))) % rows
            column = (column + int(torch.floor(torch.tensor(dx / p + 0.5)))) % columns
            if flip:
                column = columns - 1 - column
            moved.append(row * columns + column)
        sequences.append(torch.cat([cls[image], tokens[image, moved]]))
    z = torch.stack(sequences)
    for block in model.blocks[:-1]:
        z = block(z)
    last = model.blocks[-1]
    heads = last.attn.num_heads
    q, k, _ = last.attn.qkv(last.norm1(z)).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    row = (q[:, :, :1] @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1).mean(1)[:, 0, 1:]
    z = model.norm(last(z))
    return model.head(z[:, 0]), row.detach()


def naive_inversion(model, method, x, labels, table, low, high):
    """Lists of (pixels, cells) per image, in the order in which they are finished."""
    p = model.patch_embed.patch_size[0]
    rows, columns = model.patch_embed.grid_size
    n = rows * columns
    if method == "smi":
        events = dict.fromkeys(PRUNE_AT, "prune")
    elif method == "pri":
        events = {k * (ITERATIONS // DIVISION): "emit" for k in range(1, DIVISION)}
        if n % DIVISION:
            events[ITERATIONS] = "trim"
    else:
        events = {}
    kept = [list(range(n)) for _ in x]
    finished = [[] for _ in x]
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    row = None

    def act(event, row):
        for image, cells in enumerate(kept):
            by_rank = sorted(range(len(cells)), key=lambda i: float(row[image, i]))  # lowest importance first
            if event == "prune":
                leaving = by_rank[: len(cells) - int(len(cells) * 0.7)]
            elif event == "emit":
                leaving = by_rank[-(n // DIVISION) :]
                gone = sorted(cells[i] for i in leaving)
                finished[image].append((x[image].clone(), gone))
            else:
                leaving = by_rank[: len(cells) - n // DIVISION]
            kept[image] = [cell for i, cell in enumerate(cells) if i not in leaving]

    for t in range(ITERATIONS):
        if t in events:
            act(events[t], row)
        dy, dx, flip = (0, 0, 0) if t in events or t + 1 in events else table[t]
        x.requires_grad_(True)
        logits, row = naive_forward(model, x, kept, dy, dx, flip)
        loss = F.cross_entropy(logits, labels) + 1e-4 * naive_total_variation(x)
        (grad,) = torch.autograd.grad(loss, x)
        x = x.detach()
        for image, cells in enumerate(kept):
            for cell in cells:
                r, c = divmod(cell, columns)
                at = (image, slice(None), slice(r * p, r * p + p), slice(c * p, c * p + p))
                m[at] = 0.5 * m[at] + 0.5 * grad[at]
                v[at] = 0.99 * v[at] + 0.01 * grad[at] ** 2
                x[at] -= 0.25 * (m[at] / (1 - 0.5 ** (t + 1))) / ((v[at] / (1 - 0.99 ** (t + 1))).sqrt() + 1e-8)
        x = torch.minimum(torch.maximum(x, low), high)  # pixels of patches that left were clipped when they were active
    if ITERATIONS in events:
        act(events[ITERATIONS], row)
    for image, cells in enumerate(kept):
        finished[image].append((x[image].clone(), cells))
    return [item for images in finished for item in images]


def run_both(method, **model_options):
    model = small_vit(**model_options).double()
    vit = describe(model)
    torch.manual_seed(3)
    init = torch.randn(3, vit.channels, *vit.image_size, dtype=torch.float64)
    labels = torch.tensor([1, 4, 2])
    table = augmentation.draw(ITERATIONS, vit.image_size, torch.Generator().manual_seed(5), jitter=5)
    options = {"smi": {"prune_at": PRUNE_AT}, "pri": {"division": DIVISION}}.get(method, {})
    per_trajectory = DIVISION if method == "pri" else 1
    images = smi.invert(
        model,
        method=method,
        num_images=3 * per_trajectory,
        iterations=ITERATIONS,
        init=init,
        labels=labels,
        augmentation=table.tolist(),
        dtype="float64",
        progress=False,
        **options,
    )
    low, high = (bound.view(1, -1, 1, 1) for bound in vit.valid_range())
    expected = naive_inversion(model, method, init.clone(), labels, table.tolist(), low, high)
    assert len(images) == len(expected)
    p, columns = vit.patch_size, vit.grid[1]
    for i, (pixels, cells) in enumerate(expected):
        assert images.index[i].tolist() == cells
        for patch, cell in zip(images.patches[i], cells, strict=True):
            r, c = divmod(cell, columns)
            torch.testing.assert_close(patch, pixels[:, r * p : r * p + p, c * p : c * p + p], rtol=0, atol=1e-9)


def test_dense_is_the_published_loop():
    run_both("dense")


def test_smi_is_the_published_loop():
    run_both("smi")


def test_pri_is_the_published_loop_and_drops_what_is_left_over():
    run_both("pri")  # 16 patches in 3 images of 5


def test_not_square():
    run_both("pri", img_size=(12, 20))
