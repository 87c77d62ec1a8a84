"""nnU-Net's training augmentation of 2D patches, faster, and on a GPU where it is asked for.

The transforms, their probabilities and ranges stay nnU-Net's own objects, which also draw what is
random, in the same order. Only how some of them compute is replaced: rotation and scaling sample
the labels once, whatever their number, blurring adds shifted copies, a label is removed in one
pass, and noise is drawn where the image is.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform, _build_kernel
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.cropping import crop_tensor
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTransform
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

_TRUNCATE = 6  # standard deviations of the blur's kernel, nnU-Net's
# nnU-Net sums label scores in half precision, in which 0.5 in 1000 is lost: as near is a tie
_TIE = 5e-4


def faster(transforms: BasicTransform) -> BasicTransform:
    """Return nnU-Net's training transforms with faster ones in place of those that are slow.

    Args:
        transforms: As ``get_training_transforms`` of nnU-Net's trainer returns them. What is not
            known here stays as it is: elastic deformation, 3D, other modes.
    """
    if not isinstance(transforms, ComposeTransforms):
        return transforms
    return ComposeTransforms([_faster(each) for each in transforms.transforms])


def _faster(transform: BasicTransform) -> BasicTransform:
    if isinstance(transform, RandomTransform):
        inner = _faster(transform.transform)
        return RandomTransform(inner, transform.apply_probability)
    replacements = {
        SpatialTransform: (AffineTransform, _is_plain_affine),
        GaussianBlurTransform: (BlurTransform, lambda _: True),
        GaussianNoiseTransform: (NoiseTransform, lambda _: True),
        RemoveLabelTransform: (RemoveTransform, lambda _: True),
    }
    kind, suits = replacements.get(type(transform), (None, None))
    if kind is None or suits is None or not suits(transform):
        return transform
    replaced = copy.copy(transform)
    replaced.__class__ = kind
    return replaced


def _is_plain_affine(transform: SpatialTransform) -> bool:
    """Return whether a spatial transform is what nnU-Net's trainers use in 2D."""
    return (
        len(transform.patch_size) == 2
        and not transform.p_elastic_deform
        and not transform.random_crop
        and transform.mode_image == transform.mode_seg == "bilinear"
        and transform.padding_mode_image == "zeros"
        and transform.border_mode_seg == "constant"
        and not transform.align_corners
        # batchgeneratorsv2 before 0.3.6 had no such rule, and other labels at borders
        and getattr(transform, "seg_tiebreak", None) == "nearest"
    )


class AffineTransform(SpatialTransform):
    """Rotation, scaling and cropping of a 2D patch, as ``SpatialTransform`` draws them."""

    def _get_base_grid_clone(self) -> Tensor:
        """Return next to nothing: the affine matrix that is drawn says all."""
        return torch.zeros(1, 1, 2)

    def apply(self, data_dict: dict[str, Any], **params: Any) -> dict[str, Any]:
        """Transform image (C, H, W) and segmentation (S, H, W), wherever they are."""
        image, segmentation = data_dict["image"], data_dict.get("segmentation")
        size = [int(side) for side in self.patch_size]
        if params["affine"] is None:
            centre = [math.floor(side / 2) for side in image.shape[1:]]
            data_dict["image"] = crop_tensor(image, centre, size, pad_kwargs={"value": 0})
            if segmentation is not None:
                pad = {"value": self.padding_value_seg}
                data_dict["segmentation"] = crop_tensor(segmentation, centre, size, pad_kwargs=pad)
            return data_dict
        matrix = torch.as_tensor(params["affine"], dtype=torch.float32, device=image.device)
        grid = sampling_grid(matrix, size, image.shape[1:])
        data_dict["image"] = F.grid_sample(
            image[None], grid[None], mode="bilinear", padding_mode="zeros", align_corners=False
        )[0]
        if segmentation is not None:
            pad_label = int(self.padding_value_seg)
            data_dict["segmentation"] = sample_labels(segmentation, grid, pad_label)
        return data_dict


def sampling_grid(
    matrix: Float[Tensor, "2 2"], size: Sequence[int], shape: Sequence[int]
) -> Float[Tensor, "height width 2"]:
    """Return where each pixel of a patch lies in an image, as ``grid_sample`` wants it: x, y.

    Args:
        matrix: Of vectors (y, x) in pixels from the patch's centre, which is the image's.
        size: Of the patch.
        shape: Of the image.
    """
    rows, columns = (
        torch.arange(side, device=matrix.device, dtype=matrix.dtype) - (side - 1) / 2
        for side in size
    )
    grid = torch.empty((*size, 2), device=matrix.device)
    for axis in range(2):  # in shares of half the image
        share = matrix[axis] * (2 / shape[axis])
        torch.add(share[0] * rows[:, None], share[1] * columns, out=grid[..., 1 - axis])
    return grid


def sample_labels(
    labels: Int[Tensor, "channel _ _"], grid: Float[Tensor, "height width 2"], outside: int
) -> Int[Tensor, "channel height width"]:
    """Return the label with the largest bilinear weight at each place.

    Only the four pixels around a place have a weight. Where the nearest pixel and all around it
    have one label, that is it; the other places are looked at by themselves. nnU-Net resamples an
    indicator of every label instead. A tie goes to the nearest pixel.

    Args:
        labels: Integers.
        grid: As for ``grid_sample``.
        outside: What is around the labels.
    """
    height, width = labels.shape[1:]
    padded = F.pad(labels, (1, 1, 1, 1), value=outside).flatten(1)
    below = width + 2  # steps to the pixel below
    upper_left = padded[:, : -below - 1]
    differ = upper_left != padded[:, 1:-below]
    differ |= upper_left != padded[:, below:-1]
    differ |= upper_left != padded[:, below + 1 :]
    corners = F.pad(differ.any(0), (0, below + 1)).view(height + 2, below)
    mixed = corners[1:-1, 1:-1] | corners[1:-1, :-2] | corners[:-2, 1:-1] | corners[:-2, :-2]
    # in one look: the label, and in its lowest bit whether another one is around it
    marked = (labels.float() - outside).mul_(2).add_(mixed)
    seen = F.grid_sample(
        marked[None], grid[None], mode="nearest", padding_mode="zeros", align_corners=False
    )[0].to(torch.int32)
    result = seen.bitwise_right_shift(1).add_(outside).to(labels.dtype)
    rows, columns = seen[0].bitwise_and_(1).nonzero(as_tuple=True)
    x, y = (grid[rows, columns] + 1).mul_(grid.new_tensor([width, height]) / 2).add_(0.5).unbind(1)
    y, x = y.clamp_(0, height + 0.99), x.clamp_(0, width + 0.99)  # in padded pixels
    top, left = y.floor(), x.floor()
    down, right = y - top, x - left
    weights = torch.stack(
        [(1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right]
    )
    corner = (top * below + left).long()
    around = [padded[:, corner + step] for step in (0, 1, below, below + 1)]
    nearest = (down > 0.5).int().mul_(2).add_(right > 0.5)
    best = torch.full_like(weights[0], -1).expand(len(labels), -1).clone()
    chosen = result[:, rows, columns]
    for number, own in enumerate(around):  # the weight of each corner's label
        score = sum((own == other) * weight for other, weight in zip(around, weights, strict=True))
        score = score + _TIE * (nearest == number)
        is_better = score > best
        best = torch.where(is_better, score, best)
        chosen = torch.where(is_better, own, chosen)
    result[:, rows, columns] = chosen
    return result


class RemoveTransform(RemoveLabelTransform):
    """Another label in place of one, as ``RemoveLabelTransform``, in one pass."""

    def _apply_to_segmentation(self, segmentation: Tensor, **params: Any) -> Tensor:
        if self.segmentation_channels is None:
            return segmentation.masked_fill_(segmentation == self.label_value, self.set_to)
        return super()._apply_to_segmentation(segmentation, **params)


class BlurTransform(GaussianBlurTransform):
    """Gaussian blur of channels, as ``GaussianBlurTransform`` draws it."""

    def _apply_to_image(self, img: Tensor, **params: Any) -> Tensor:
        channels = params["apply_to_channel"].nonzero()[:, 0].tolist()
        sigmas = params["sigmas"]
        if self.synchronize_channels:
            sigmas = [sigmas] * len(channels)
        for channel, own in zip(channels, sigmas, strict=True):
            for axis, sigma in enumerate(own):
                img[channel] = blurred(img[channel], sigma, axis)
        return img


def blurred(image: Float[Tensor, ...], sigma: float, axis: int) -> Float[Tensor, ...]:
    """Return an image blurred along an axis, reflected at its ends.

    Args:
        image: (H, W) or (D, H, W).
        sigma: Standard deviation in pixels; the kernel is nnU-Net's.
        axis: Of the image.
    """
    kernel = _build_kernel(sigma, truncate=_TRUNCATE).tolist()
    reach, length = len(kernel) // 2, image.shape[axis]
    pads = [0, 0] * image.ndim
    place = 2 * (image.ndim - 1 - axis)  # torch begins with the last axis
    pads[place : place + 2] = [reach, reach]
    padded = F.pad(image[None, None], pads, mode="reflect")[0, 0]
    total = padded.narrow(axis, 0, length) * kernel[0]
    for step, weight in enumerate(kernel[1:], 1):
        total.add_(padded.narrow(axis, step, length), alpha=weight)
    return total


class NoiseTransform(GaussianNoiseTransform):
    """Gaussian noise, as ``GaussianNoiseTransform`` draws its strength; drawn on the device."""

    def _apply_to_image(self, img: Tensor, **params: Any) -> Tensor:
        if "apply_idx" in params:
            params = params | {"apply_idx": params["apply_idx"].to(img.device)}
        return super()._apply_to_image(img, **params)


def augment_batch(
    transforms: BasicTransform, data: Float[Tensor, "batch _ _ _"], target: Tensor
) -> tuple[Tensor, Any]:
    """Augment every sample of a batch where it is.

    Args:
        transforms: Of nnU-Net's, ``faster``.
        data: Patches as read, on a device; overwritten.
        target: Their labels, on the same device; overwritten.

    Returns:
        Data and target as nnU-Net's loader makes them.
    """
    samples = [
        transforms(image=image, segmentation=labels)
        for image, labels in zip(data.unbind(), target.unbind(), strict=True)
    ]
    return torch.stack([s["image"] for s in samples]), torch.stack(
        [s["segmentation"] for s in samples]
    )
