import itertools

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from torch.nn import functional as F

from vlcp_dist.ops import augment


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=rng(seed))


def as_pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def test_crop_equals_cropping_and_then_resizing():
    images = torch.rand(4, 3, 20, 28, generator=rng())
    crops = torch.tensor([[0, 0, 20, 28], [3, 5, 14, 20], [6, 8, 14, 20], [1, 0, 11, 28]])
    flips = torch.tensor([False, False, True, True])
    out = augment.crop_and_flip(images, crops, flips)
    for image, (top, left, height, width), flip, got in zip(images, crops.tolist(), flips, out, strict=True):
        part = image[None, :, top : top + height, left : left + width]
        want = F.interpolate(part, (20, 28), mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(got, want.flip(-1) if flip else want, atol=2e-5, rtol=0)


def test_crop_equals_pillow():
    image = torch.rand(1, 1, 24, 24, generator=rng())
    got = augment.crop_and_flip(image, torch.tensor([[4, 2, 17, 21]]), torch.tensor([False]))
    channel = Image.fromarray(image[0, 0].numpy()).crop((2, 4, 23, 21))
    want = np.asarray(channel.resize((24, 24), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(got[0, 0].numpy(), want, atol=2e-5)


def test_crops_lie_inside_and_have_the_asked_area_and_aspect():
    height, width = 60, 90
    crops = augment.draw_crops(5000, height, width, scale=(0.3, 0.7), generator=rng()).double()
    top, left, h, w = crops.unbind(1)
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + h <= height).all() and (left + w <= width).all()
    area, aspect = h * w / (height * width), w / h
    assert area.min() > 0.28 and area.max() < 0.72
    assert aspect.min() > 0.72 and aspect.max() < 1.39
    # Every corner of the image is reached, and the areas are spread evenly over their range where all of them fit.
    assert top.min() == 0 and left.min() == 0 and (top + h).max() == height and (left + w).max() == width
    small = augment.draw_crops(20000, 100, 100, scale=(0.2, 0.5), generator=rng()).double()
    quartiles = (small[:, 2] * small[:, 3] / 1e4).quantile(torch.tensor([0.25, 0.5, 0.75]).double())
    torch.testing.assert_close(quartiles, torch.tensor([0.275, 0.35, 0.425]).double(), atol=0.006, rtol=0)
    logs = (small[:, 3] / small[:, 2]).log()
    assert abs(logs.mean()) < 0.01 and logs.std().item() == pytest.approx(2 * np.log(4 / 3) / 12**0.5, rel=0.03)


@pytest.mark.parametrize(
    ("height", "width", "box"), [(10, 100, [0, 43, 10, 13]), (100, 10, [43, 0, 13, 10]), (30, 30, [0, 0, 30, 30])]
)
def test_where_no_crop_fits_the_largest_centred_one_is_taken(height, width, box):
    crops = augment.draw_crops(50, height, width, scale=(1.0, 1.0), generator=rng())
    assert crops.tolist() == [box] * 50


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_recolor_equals_the_three_blends_in_any_order(order):
    image = torch.rand(3, 9, 11, generator=rng()).double()
    factors, shift = torch.tensor([1.37, 0.64, 0.7]).double(), torch.tensor([0.02, -0.01, 0.03]).double()

    def grey(x):
        return 0.299 * x[0] + 0.587 * x[1] + 0.114 * x[2]

    targets = [lambda x: 0 * x, lambda x: grey(x).mean(), grey]  # brightness, contrast, saturation
    want = image
    for i in order:
        want = factors[i] * want + (1 - factors[i]) * targets[i](want)
    got = augment.recolor(image[None].float(), factors[None].float(), shift[None].float())[0]
    torch.testing.assert_close(got.double(), want + shift[:, None, None], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("position", "enhance"), [(0, ImageEnhance.Brightness), (1, ImageEnhance.Contrast), (2, ImageEnhance.Color)]
)
def test_recolor_equals_pillow_where_nothing_clips(position, enhance):
    image = pictures(1, 16, 16) // 3 + 60
    factors = torch.ones(1, 3)
    factors[0, position] = 1.3
    want = as_tensor(enhance(as_pil(image[0])).enhance(1.3))
    got = augment.recolor(image.float() / 255, factors, torch.zeros(1, 3))[0] * 255
    torch.testing.assert_close(got, want.float(), atol=1.5, rtol=0)


def test_lighting_has_the_covariance_of_its_components():
    shifts = augment.draw_lighting(200_000, 0.1, generator=rng()).double()
    vectors, values = torch.tensor(augment.PCA_VECTORS).double(), torch.tensor(augment.PCA_VALUES).double()
    want = vectors @ torch.diag((0.1 * values) ** 2) @ vectors.T
    torch.testing.assert_close(shifts.T.cov(), want, atol=3e-6, rtol=0.02)
    assert shifts.mean(0).abs().max() < 1e-4


def test_normalize():
    image = torch.tensor([0.485, 0.456 + 0.224, 0.406 - 0.225]).view(1, 3, 1, 1)
    torch.testing.assert_close(augment.normalize(image).flatten(), torch.tensor([0.0, 1.0, -1.0]))


def test_augment_with_only_a_flip_is_the_mirrored_normalised_image():
    images = pictures(3, 16, 16)
    settings = {"crop_scale": (1.0, 1.0), "color_jitter": 0.0, "lighting": 0.0}
    plain = augment.normalize(images / 255)
    kept = augment.augment(images, flip=0.0, generator=rng(), **settings)
    torch.testing.assert_close(kept, plain, atol=1e-4, rtol=0)
    mirrored = augment.augment(images, flip=1.0, generator=rng(), **settings)
    torch.testing.assert_close(mirrored, plain.flip(-1), atol=1e-4, rtol=0)


def test_augment_draws_each_image_from_the_generator_alone():
    images = pictures(1, 16, 16).expand(6, -1, -1, -1)
    settings = {"crop_scale": (0.5, 1.0), "flip": 0.5, "color_jitter": 0.4, "lighting": 0.1}
    before = torch.get_rng_state()
    first = augment.augment(images, generator=rng(1), **settings)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(augment.augment(images, generator=rng(1), **settings), first)
    assert not torch.equal(augment.augment(images, generator=rng(2), **settings), first)
    assert len({tuple(image.flatten().tolist()) for image in first}) == 6


def test_jitter_stays_in_its_range():
    white = torch.full((500, 3, 2, 2), 255, dtype=torch.uint8)
    settings = {"crop_scale": (1.0, 1.0), "flip": 0.0, "lighting": 0.0}
    out = augment.augment(white, color_jitter=0.4, generator=rng(), **settings)
    mean, std = torch.tensor(augment.IMAGENET_MEAN), torch.tensor(augment.IMAGENET_STD)
    # Contrast and saturation leave a uniform grey image as it is, so that brightness alone is seen.
    factors = (out.mean((2, 3)) * std + mean)[:, 0]
    assert 0.6 <= factors.min() < 0.61 and 1.39 < factors.max() <= 1.4001


@pytest.mark.parametrize(("height", "width"), [(40, 61), (90, 50), (20, 24)])
def test_resize_and_crop_equals_pillow(height, width):
    images = pictures(2, height, width)
    got = augment.resize_and_crop(images, 32)
    assert got.dtype == torch.uint8 and got.shape == (2, 3, 32, 32)
    scale = min(height, width)
    tall, wide = 32 * height // scale, 32 * width // scale
    top, left = round((tall - 32) / 2), round((wide - 32) / 2)
    for image, out in zip(images, got, strict=True):
        want = as_pil(image).resize((wide, tall), Image.Resampling.BILINEAR)
        want = as_tensor(want.crop((left, top, left + 32, top + 32)))
        assert (out.int() - want.int()).abs().max() <= 1


def test_resize_and_crop_leaves_images_of_the_size_alone():
    images = pictures(2, 32, 32)
    assert torch.equal(augment.resize_and_crop(images, 32), images)


@pytest.mark.parametrize(("height", "width", "factor"), [(8, 12, 2), (9, 13, 2), (10, 11, 3)])
def test_patches_are_shuffled_by_columns_and_rows_for_each_image(height, width, factor):
    images = torch.arange(60 * 3 * height * width).view(60, 3, height, width).float()
    shuffled = augment.shuffle_patches(images, factor, generator=rng())

    def parts(image: torch.Tensor, dim: int) -> list[torch.Tensor]:
        side = image.shape[dim]
        return list(image.split([side // factor] * (factor - 1) + [side - side // factor * (factor - 1)], dim))

    seen = set()
    for image, got in zip(images, shuffled, strict=True):
        options = {
            (rows, columns): torch.cat(
                [torch.cat([parts(parts(image, 1)[i], 2)[j] for j in columns], 2) for i in rows], 1
            )
            for rows in itertools.permutations(range(factor))
            for columns in itertools.permutations(range(factor))
        }
        (order,) = [order for order, want in options.items() if torch.equal(got, want)]
        seen.add(order)
    assert len(seen) == len(options) if factor == 2 else len(seen) > len(options) / 2
    assert torch.equal(augment.shuffle_patches(images, factor, generator=rng()), shuffled)


def test_center_crop_is_the_middle():
    image = torch.arange(36).view(1, 1, 6, 6)
    assert augment.center_crop(image, 2).flatten().tolist() == [14, 15, 20, 21]
    assert torch.equal(augment.center_crop(image, 6), image)


def test_cutmix_pastes_one_box_and_shares_the_targets_by_pixels():
    targets = torch.arange(8)
    images = targets.view(8, 1, 1, 1).expand(8, 3, 20, 30).float()  # every pixel tells its image
    generator = rng()
    shares = []
    for _ in range(300):
        mixed, (own, pasted, share) = augment.cutmix(images, targets, probability=1.0, generator=generator)
        assert torch.equal(own, targets)
        assert sorted(pasted.tolist()) == targets.tolist()
        partner = pasted.view(8, 1, 1, 1)
        assert ((mixed == images) | (mixed == partner)).all()
        moved = own != pasted
        box = (mixed == partner)[moved]
        assert (box == box[:1, :1]).all()  # the batch and the channels share it
        rows, columns = torch.nonzero(box[0, 0], as_tuple=True)
        if len(rows):
            extent = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
            assert extent == len(rows)
        assert share == pytest.approx(1 - len(rows) / 600)
        shares.append(share)
    assert min(shares) < 0.4 and max(shares) > 0.95
    assert torch.equal(images[:, 0, 0, 0], targets.float())  # the input is left as it was


def test_cutmix_shares_follow_a_uniform_lambda_and_centre():
    images, targets, generator = torch.zeros(1, 1, 200, 200), torch.zeros(1), rng()
    shares = [augment.cutmix(images, targets, probability=1.0, generator=generator)[1][2] for _ in range(8000)]
    # A side r of the unit axis covers r - r^2 / 4 of it on average over its centre, and r^2 is uniform.
    assert np.mean(shares) == pytest.approx(1 - (1 / 2 - 1 / 5 + 1 / 48), abs=0.01)


def test_cutmix_happens_with_its_probability():
    images, targets = torch.randn(4, 3, 8, 8), torch.arange(4)
    same, (own, pasted, share) = augment.cutmix(images, targets, probability=0.0, generator=rng())
    assert share == 1.0 and torch.equal(same, images) and torch.equal(own, pasted)
    generator = rng()
    cut = [augment.cutmix(images, targets, probability=0.3, generator=generator)[1][2] < 1 for _ in range(1000)]
    assert 0.2 < np.mean(cut) < 0.33  # a few boxes are empty
