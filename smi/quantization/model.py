"""What every quantised ViT shares: the facts that images and tensors must fit, and the ways images can be given."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..images.patches import to_patches
from ..images.sparse_images import SparseImages, check_labels
from ..models.vit import ViT
from ..plain import dense, flag, real, several, whole, word
from .recipe import Recipe

Images = Tensor | SparseImages | tuple[Tensor, Tensor]
BLOCK_POINTS = ("attn.qkv_output", "attn.scores", "attn.proj_output", "attn_sum", "mlp.fc2_output", "mlp_sum")  # of the published recipe
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")  # names of kernels.linear_gelu


@dataclass(frozen=True)
class Facts:
    """What a quantised ViT takes and gives, and how it was quantised; plain data for a JSON file."""

    name: str
    grid: tuple[int, int]  # patches: rows, columns
    patch_size: int  # pixels
    channels: int
    num_classes: int
    architecture: dict  # of `_architecture`
    recipe: Recipe
    calibration: dict = field(default_factory=dict)  # what calibrated it, as JSON; not in the files of version 0.1.0

    @staticmethod
    def of(vit: ViT, recipe: Recipe) -> "Facts":
        return Facts(vit.name, vit.grid, vit.patch_size, vit.channels, vit.num_classes, _architecture(vit), recipe)

    @staticmethod
    def from_json(data: dict) -> "Facts":
        """What `to_json` gave; raises InputError for numbers that no model has."""
        numbers = {name: whole(1)(name, data[name]) for name in ("patch_size", "channels", "num_classes")}
        rows, columns = several(whole(1), 2)("grid", data["grid"])
        name, recipe = word("name", data["name"]), Recipe(**data["recipe"])
        return Facts(
            name,
            (rows, columns),
            **numbers,
            architecture=_checked_architecture(data["architecture"]),
            recipe=recipe,
            calibration=dict(data.get("calibration", {})),
        )

    def to_json(self) -> dict:
        return asdict(self)

    @property
    def image_size(self) -> tuple[int, int]:
        """Pixels: height, width."""
        return self.grid[0] * self.patch_size, self.grid[1] * self.patch_size

    def linears(self) -> list[str]:
        """Names of the linear layers in the order in which they run."""
        blocks = range(self.architecture["depth"])
        inner = [f"blocks.{i}.{layer}" for i in blocks for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
        return ["embed", *inner, *(f"heads.{i}" for i in range(self.architecture["heads"]))]

    def operands(self) -> list[str]:
        """Names of the operands of attention's two GEMMs, in the order in which they run; none where they stay in float32."""
        blocks = range(self.architecture["depth"]) if self.recipe.operands else ()
        return [f"blocks.{i}.attn.{operand}" for i in blocks for operand in ("query", "key", "weights", "value")]

    def points(self) -> list[str]:
        """Names of the activations, beside linear layers' inputs, that the published recipe quantises, where the model has them; none in others."""
        if not self.recipe.published:
            return []
        first = ["tokens", *(["positions", "embedded"] if self.architecture["position"] else [])]
        first += ["norm_pre_output"] if "norm_pre" in self.architecture["eps"] else []
        inner = [f"blocks.{i}.{point}" for i in range(self.architecture["depth"]) for point in BLOCK_POINTS]
        return [*first, *inner, *(f"head_outputs.{i}" for i in range(self.architecture["heads"]))]

    def activations(self) -> list[str]:
        """Names of all quantised activations; that of a linear layer stands for its input. The published recipe leaves the image in float."""
        return [*self.linears()[self.recipe.published :], *self.operands(), *self.points()]

    def of_block(self, name: str, i: int) -> Any:
        """A fact of block i: one for all blocks, or a list of one for each."""
        fact = self.architecture[name]
        return fact[i] if isinstance(fact, list) else fact


def _architecture(vit: ViT) -> dict:
    """What the tensors of a ViT do not tell of it: counts, and the epsilon of every LayerNorm by its name in the model."""
    norms = {"norm_pre": vit.norm_pre, "norm": vit.norm, "fc_norm": vit.fc_norm}
    for i, block in enumerate(vit.blocks):
        norms.update({f"blocks.{i}.{name}": getattr(block, name) for name in ("norm1", "norm2")})
        norms.update({f"blocks.{i}.attn.{name}": getattr(block, name) for name in ("q_norm", "k_norm")})
    return {
        "depth": len(vit.blocks),
        "num_heads": vit.num_heads,
        "prefix": vit.num_prefix,
        "heads": len(vit.heads),
        "pool": vit.pool,
        "position": vit.position is not None,
        "activation": vit.activation,
        "eps": {name: norm.eps for name, norm in norms.items() if norm is not None},
    }


def _checked_architecture(about: dict) -> dict:
    """What `_architecture` gave, from a file."""
    depth, eps = whole(1)("depth", about["depth"]), {name: real("positive", lambda x: x > 0)(name, value) for name, value in about["eps"].items()}
    checked = {"depth": depth, "pool": word("pool", about["pool"]), "eps": eps}
    for name, take in (("num_heads", whole(1)), ("activation", word)):
        fact = about[name]
        checked[name] = list(several(take, depth)(name, fact)) if isinstance(fact, list) else take(name, fact)
    checked |= {name: whole(1)(name, about[name]) for name in ("prefix", "heads")}
    checked["position"] = flag("position", about.get("position", True))  # not in the files of version 0.1.0
    if checked["pool"] not in ("token", "avg") or checked["heads"] > min(2, checked["prefix"]):
        raise InputError(f"a pooling '{checked['pool']}' with {checked['heads']} heads is not known")
    return checked


def check_tensors(facts: Facts, tensors: Mapping[str, Tensor], inputs: Mapping[str, object]) -> None:
    """Raise InputError unless these are the tensors of such a model, by name and shape, and the quantised activations those of its recipe."""
    depth, cells = facts.architecture["depth"], facts.grid[0] * facts.grid[1]
    if 4 * depth > len(tensors):  # before anything is made for every block
        raise InputError(f"there are tensors for fewer than {depth} blocks")
    if inputs.keys() != set(facts.activations()):
        raise InputError("the quantised activations are not those of the recipe")
    shape = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    prefix, d = shape.get("prefix", (0, 0))
    norms = dict.fromkeys(facts.architecture["eps"], (d,))
    wanted: dict[str, tuple[int, ...]] = {"prefix": (facts.architecture["prefix"], d), "embed": (d, facts.channels * facts.patch_size**2)}
    for i in range(depth):
        block, heads = f"blocks.{i}", facts.of_block("num_heads", i)
        width, hidden = (shape.get(f"{block}.{layer}.codes", (0, 0))[1] for layer in ("attn.proj", "mlp.fc2"))
        wanted |= {f"{block}.attn.qkv": (3 * width, d), f"{block}.attn.proj": (d, width)}
        wanted |= {f"{block}.mlp.fc1": (hidden, d), f"{block}.mlp.fc2": (d, hidden)}
        norms |= {name: (width // heads,) for name in (f"{block}.attn.q_norm", f"{block}.attn.k_norm") if name in norms}
        if not width or width % heads or facts.of_block("activation", i) not in ACTIVATIONS:
            raise InputError(f"{block} has no {heads} heads of equal width, or an unknown activation")
    wanted |= {f"heads.{i}": (facts.num_classes, d) for i in range(facts.architecture["heads"])}
    codes = {f"{name}.codes": wanted.pop(name) for name in facts.linears()}
    needed = {**wanted, **codes, **{f"{name}.scales": codes[f"{name}.codes"][:1] for name in facts.linears()}}
    needed |= {f"{name}.weight": size for name, size in norms.items()}
    position = {"prefix_position": (facts.architecture["prefix"], d), "position": (cells, d)} if facts.architecture["position"] else {}
    needed |= position if facts.recipe.published else {}
    optional = {**position, **{f"blocks.{i}.{scale}.gamma": (d,) for i in range(depth) for scale in ("ls1", "ls2")}}
    optional |= {f"{name}.bias": size for name, size in norms.items()} | {f"{name}.bias": codes[f"{name}.codes"][:1] for name in facts.linears()}
    for name in needed.keys() | shape.keys():
        if shape.get(name) != {**optional, **needed}.get(name):
            raise InputError(f"{name} must be {list({**optional, **needed}.get(name, ()))}, it is {list(shape.get(name, ()))}")
        if not name.endswith(".codes") and (tensors[name].dtype != torch.float32 or not torch.isfinite(tensors[name]).all()):
            raise InputError(f"{name} must hold finite float32 numbers")


def as_patches(facts: Facts, images: Images) -> tuple[Tensor, Tensor]:
    """Patches [B, n, C, p, p] and their cells [B, n]; raises InputError where the images are for another model."""
    name, (rows, columns) = facts.name, facts.grid
    if isinstance(images, SparseImages):
        if images.grid != facts.grid:
            raise InputError(f"{name} has a {rows}x{columns} grid of patches, these images are on {images.grid[0]}x{images.grid[1]}")
        if len(images) and not 0 <= int(images.labels.min()) <= int(images.labels.max()) < facts.num_classes:
            raise InputError(f"{name} has {facts.num_classes} classes, these images have labels up to {int(images.labels.max())}: made for another")
        patches, index = images.patches, images.index
    elif isinstance(images, Tensor):
        wanted = (facts.channels, *facts.image_size)
        if dense("images", images).ndim != 4 or tuple(images.shape[1:]) != wanted or not images.dtype.is_floating_point:
            kind = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
            raise InputError(f"{name} takes images [B, {', '.join(map(str, wanted))}] of normalised pixels, these are {kind}")
        patches = to_patches(images, facts.patch_size)
        index = torch.arange(rows * columns, device=images.device).expand(len(images), -1)
    else:
        patches, index = _checked_pair(facts, images)
    wanted = (facts.channels, facts.patch_size, facts.patch_size)
    if tuple(patches.shape[2:]) != wanted:
        raise InputError(f"{name} takes patches {list(wanted)}, these are {list(patches.shape[2:])}")
    return patches, index.long()


def _checked_pair(facts: Facts, pair: Any) -> tuple[Tensor, Tensor]:
    if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(part, Tensor) for part in pair)):
        raise InputError("images must be SparseImages, a tensor [B, C, H, W] of normalised pixels, or (patches [B, n, C, p, p], index [B, n])")
    patches, index = dense("patches", pair[0]), dense("index", pair[1])
    cells = facts.grid[0] * facts.grid[1]
    if patches.ndim != 5 or patches.shape[:2] != index.shape or index.dtype.is_floating_point:
        raise InputError(f"patches [B, n, C, p, p] and whole numbers index [B, n] must fit, got {list(patches.shape)} and {list(index.shape)}")
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < cells:
        raise InputError(f"index must name cells of the {facts.grid[0]}x{facts.grid[1]} grid, 0 to {cells - 1}")
    return patches, index


def check_images(patches: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Raise InputError unless there are images to calibrate with, of finite pixels."""
    if not len(patches):
        raise InputError("there are no images to calibrate with")
    if not torch.isfinite(patches).all():
        raise InputError("the images to calibrate with hold NaN or infinity")
    return patches, index


def batches(patches: Tensor, index: Tensor, size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """At most `size` images at a time, as the model's device and dtype want them."""
    for some, cells in zip(patches.split(size), index.split(size), strict=True):
        yield some.to(device, torch.float32), cells.to(device)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 64) -> float:
    """Fraction of normalised images [N, C, H, W] that a model, quantised or not, assigns to their labels [N]."""
    return recognised(model, images, labels, batch_size).sum().item() / len(images)


def recognised(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 64) -> Tensor:
    """bool [N], on the CPU: which images a model assigns to their labels, as `accuracy` counts them."""
    if not len(images) or len(images) != len(labels):
        raise InputError(f"an evaluation needs images and one label for each, got {len(images)} images and {len(labels)} labels")
    check_labels("labels", labels)
    batch_size = whole(1)("batch_size", batch_size)
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    with torch.no_grad():
        right = [
            model(some.to(device)).argmax(1).cpu() == wanted.cpu()
            for some, wanted in zip(images.split(batch_size), labels.split(batch_size), strict=True)
        ]
    return torch.cat(right)
