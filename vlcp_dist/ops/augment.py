"""The augmentations of both protocols, on whole batches where they lie (Kim et al. 2022, Sun et al. 2024).

Every draw comes from a generator on the CPU and is then moved, so that CPU and CUDA see the same crops and
colours. One resampling does crop and flip, one affine map of RGB does jitter and lighting.

kornia was weighed and set aside: it takes no generator; its jitter clips and orders the three blends once for a
whole batch, where the protocol does not clip and orders them for each image; it has no PCA lighting and no shuffle of
rows and columns of patches; and it takes four to five times as long on a CPU, passing over the batch at every step.
"""

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
GREY = (0.299, 0.587, 0.114)
# Principal components of ImageNet's RGB values in [0, 1] (Krizhevsky et al. 2012): one component per column.
PCA_VECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
PCA_VALUES = (0.2175, 0.0188, 0.0045)
CROP_ATTEMPTS = 10


def augment(
    images: Tensor,
    *,
    crop_scale: tuple[float, float],
    flip: float,
    color_jitter: float,
    lighting: float,
    generator: Generator,
) -> Tensor:
    """Random resized crop, flip, colour jitter, lighting and normalisation, drawn anew for every image.

    uint8 (b, 3, h, w) -> float32 (b, 3, h, w) on the same device. `crop_scale` is a range of the area, `flip` a
    probability, `color_jitter` half the range of the three factors about 1, `lighting` a standard deviation;
    `generator` is on the CPU.
    """
    count, _, height, width = images.shape
    crops = draw_crops(count, height, width, scale=crop_scale, generator=generator)
    flips = torch.rand(count, generator=generator) < flip
    factors = 1 + color_jitter * (2 * torch.rand(count, 3, generator=generator) - 1)
    shifts = draw_lighting(count, lighting, generator=generator)
    device = images.device
    pixels = crop_and_flip(images.float().div_(255), crops.to(device), flips.to(device))
    return normalize(recolor(pixels, factors.to(device), shifts.to(device)))


def normalize(images: Tensor) -> Tensor:
    """(b, 3, h, w) in [0, 1] to ImageNet's zero mean and unit variance."""
    mean = images.new_tensor(IMAGENET_MEAN).view(3, 1, 1)
    std = images.new_tensor(IMAGENET_STD).view(3, 1, 1)
    return (images - mean) / std


def resize_and_crop(images: Tensor, size: int) -> Tensor:
    """Shorter side to `size` (bilinear, antialiased), then centre crop: uint8 (b, 3, h, w) -> (b, 3, size, size)."""
    height, width = images.shape[-2:]
    if height == width == size:
        return images
    shorter = min(height, width)
    shape = (height * size // shorter, width * size // shorter)
    resized = F.interpolate(images.float(), shape, mode="bilinear", antialias=True, align_corners=False)
    return center_crop(resized, size).round().clamp_(0, 255).to(torch.uint8)


def center_crop(images: Tensor, size: int) -> Tensor:
    """The middle of images (b, c, h, w), `size` pixels square."""
    top, left = (round((side - size) / 2) for side in images.shape[-2:])
    return images[..., top : top + size, left : left + size]


def draw_crops(
    count: int,
    height: int,
    width: int,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    generator: Generator,
) -> Tensor:
    """Boxes (count, 4) int64 of top, left, height, width; area uniform in `scale`, aspect log-uniform in `ratio`.

    A box is the first of ten attempts that fits into the image; where none does, it is the largest centred box of an
    allowed aspect, as random resized crops usually are.
    """
    area = height * width * torch.empty(count, CROP_ATTEMPTS).uniform_(*scale, generator=generator)
    log_ratio = torch.tensor(ratio).log()
    aspect = torch.empty(count, CROP_ATTEMPTS).uniform_(*log_ratio.tolist(), generator=generator).exp()
    corner = torch.rand(count, 2, generator=generator)

    widths, heights = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = fits.int().argmax(dim=1, keepdim=True)
    w, h = widths.gather(1, first)[:, 0], heights.gather(1, first)[:, 0]
    top, left = (corner[:, 0] * (height - h + 1)).floor(), (corner[:, 1] * (width - w + 1)).floor()

    whole_w, whole_h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
    whole = torch.tensor([(height - whole_h) // 2, (width - whole_w) // 2, whole_h, whole_w])
    boxes = torch.stack([top, left, h, w], dim=1).long()
    return torch.where(fits.any(dim=1, keepdim=True), boxes, whole)


def crop_and_flip(images: Tensor, crops: Tensor, flips: Tensor) -> Tensor:
    """Each float image's box stretched over the whole image (bilinear), then mirrored where `flips`.

    images (b, c, h, w), crops (b, 4) as from `draw_crops`, flips (b,) bool. Equal to cropping first: no pixel
    outside the box is read. Nothing is antialiased, because a box is never larger than the image that it fills.
    """
    height, width = images.shape[-2:]
    top, left, crop_height, crop_width = crops.to(images.dtype).unsqueeze(-1).unbind(1)  # each (b, 1)
    y = _sample_positions(height, top, crop_height)
    x = _sample_positions(width, left, crop_width)
    x = torch.where(flips[:, None], x.flip(1), x)
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)
    return F.grid_sample(images, grid, mode="bilinear", align_corners=False)


def _sample_positions(size: int, start: Tensor, length: Tensor) -> Tensor:
    """Where `size` pixels spread over [start, start + length) sample an axis of `size` pixels: (b, size) in [-1, 1]."""
    centres = (torch.arange(size, device=start.device, dtype=start.dtype) + 0.5) / size
    inside = (start + centres * length).clamp(start + 0.5, start + length - 0.5)
    return inside * (2 / size) - 1


def draw_lighting(count: int, std: float, *, generator: Generator) -> Tensor:
    """RGB shifts (count, 3): the sum of ImageNet's principal components, each times its eigenvalue and N(0, std)."""
    alpha = std * torch.randn(count, 3, generator=generator)
    return (alpha * torch.tensor(PCA_VALUES)) @ torch.tensor(PCA_VECTORS).T


def recolor(images: Tensor, factors: Tensor, shifts: Tensor) -> Tensor:
    """Brightness, contrast and saturation by `factors` (b, 3), then `shifts` (b, 3) added to RGB.

    images float (b, 3, h, w), black 0 and white 1; nothing is clipped. The three blend an image with black, with its
    mean grey and with its own grey version. The protocol shuffles them for every image, but unclipped they commute
    (saturation and contrast keep the mean grey, brightness scales image and mean grey alike): no order is drawn.
    """
    grey = images.new_tensor(GREY)
    brightness, contrast, saturation = factors[:, :, None].unbind(1)  # each (b, 1)
    mean_grey = images.mean(dim=(2, 3)) @ grey
    to_grey = (1 - saturation)[:, :, None] * grey  # (b, 1, 3): every output channel takes the same part of grey
    blend = saturation[:, :, None] * torch.eye(3, device=images.device) + to_grey
    matrix = (brightness * contrast)[:, :, None] * blend
    offset = brightness * (1 - contrast) * mean_grey[:, None] + shifts
    return torch.baddbmm(offset[:, :, None], matrix, images.flatten(2)).view_as(images)


def shuffle_patches(images: Tensor, factor: int, *, generator: Generator) -> Tensor:
    """Cut each image (b, c, h, w) into `factor` columns and as many rows, and put both in an order drawn for it.

    The order of the columns is the same in every row, as in RDED: of 2x2 patches, neighbours stay neighbours. What a
    side has beyond a multiple of `factor` belongs to its last patch.
    """
    count, _, height, width = images.shape
    rows, columns = (_shuffled(count, side, factor, generator).to(images.device) for side in (height, width))
    every = torch.arange(count, device=images.device)[:, None, None]
    # Advanced indices around a slice: the channels come last, as (b, h, w, c).
    return images[every, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _shuffled(count: int, side: int, factor: int, generator: Generator) -> Tensor:
    """Positions (count, side) of an axis whose `factor` parts are in a random order."""
    parts = list(torch.arange(side).split([side // factor] * (factor - 1) + [side - side // factor * (factor - 1)]))
    orders = torch.rand(count, factor, generator=generator).argsort(1).tolist()
    return torch.stack([torch.cat([parts[i] for i in order]) for order in orders])


def cutmix(
    images: Tensor, targets: Tensor, *, probability: float, generator: Generator
) -> tuple[Tensor, tuple[Tensor, Tensor, float]]:
    """Paste one random box of a shuffled batch over the batch (Yun et al. 2019), with lambda from Beta(1, 1).

    images (b, c, h, w), targets (b,) -> mixed images and (targets, targets of the pasted images, share of the pixels
    that were not pasted over). The batch shares one box and lambda, as the protocol has it. With 1 - `probability`
    the batch comes back as it is, with share 1.
    """
    height, width = images.shape[-2:]
    chance, lam, row, column = torch.rand(4, generator=generator).tolist()  # Beta(1, 1) is uniform
    order = torch.randperm(len(images), generator=generator).to(images.device)
    if chance >= probability:
        return images, (targets, targets, 1.0)
    (top, bottom), (left, right) = _cut(height, lam, row), _cut(width, lam, column)
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = images[order, :, top:bottom, left:right]
    kept = 1 - (bottom - top) * (right - left) / (height * width)
    return mixed, (targets, targets[order], kept)


def _cut(size: int, lam: float, position: float) -> tuple[int, int]:
    """The range of an axis that a box with (1 - lam) of the area covers; its centre at `position` in [0, 1)."""
    centre, half = int(size * position), int(size * (1 - lam) ** 0.5) // 2
    return max(centre - half, 0), min(centre + half, size)
