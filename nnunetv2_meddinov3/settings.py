"""The environment variables of the package, and their values checked."""

import difflib
import os

from nnunetv2_meddinov3.errors import UserError

VARIABLES = {
    "MEDDINOV3_WEIGHTS": "pretrained weights: a path, timm:, hf:, torchhub: or none",
    "MEDDINOV3_BACKBONE": "size of the ViT where no weights say it",
    "MEDDINOV3_SIZE": "side of the planner's configuration in pixels",
    "MEDDINOV3_EPOCHS": "number of epochs instead of the recipe's",
    "MEDDINOV3_ITERATIONS": "training iterations per epoch instead of 250",
    "MEDDINOV3_CHECKPOINTING": "1 recomputes the ViT's activations to save GPU memory",
    "MEDDINOV3_PREDICTOR": "1 lets nnUNetv2_predict use the predictor of meddinov3 predict",
    "MEDDINOV3_AUTOREGISTER": "0 keeps the start-up file from registering our names",
}
SIZE_NAMES = (
    "vit_tiny",
    "vit_small",
    "vit_small_plus",
    "vit_base",
    "vit_large",
    "vit_huge_plus",
    "vit_7b",
)


def check_variables() -> None:
    """Refuse unknown variables with our prefix: they are typing mistakes.

    Raises:
        UserError: If there is one.
    """
    for name in os.environ:
        if name.startswith("MEDDINOV3_") and name not in VARIABLES:
            near = difflib.get_close_matches(name, VARIABLES, n=1) or list(VARIABLES)
            raise UserError(f"the environment variable {name} is unknown: did you mean {near[0]}?")


def weights_setting() -> str | None:
    """Return ``MEDDINOV3_WEIGHTS``, or None where it is unset or empty."""
    return os.environ.get("MEDDINOV3_WEIGHTS", "").strip() or None


def backbone_setting() -> str | None:
    """Return ``MEDDINOV3_BACKBONE``, or None where it is unset or empty.

    Raises:
        UserError: If it names no size.
    """
    value = os.environ.get("MEDDINOV3_BACKBONE", "").strip() or None
    if value is not None and value not in SIZE_NAMES:
        raise UserError(
            f"MEDDINOV3_BACKBONE must be one of {', '.join(SIZE_NAMES)}, got {value!r}."
        )
    return value


def count_setting(name: str) -> int | None:
    """Return a positive integer variable, or None where it is unset or empty.

    Raises:
        UserError: If it is not a positive integer.
    """
    value = os.environ.get(name, "").strip()
    if not value:
        return None
    if not value.isdecimal() or int(value) < 1:
        raise UserError(f"{name} must be a whole number of at least 1, got {value!r}.")
    return int(value)


def checkpointing_setting() -> bool | None:
    """Return whether ``MEDDINOV3_CHECKPOINTING`` asks to recompute the ViT's activations.

    None stands for a variable that is unset or empty: a continued run then keeps its own choice.

    Raises:
        UserError: If it is neither 0 nor 1.
    """
    value = os.environ.get("MEDDINOV3_CHECKPOINTING", "").strip()
    if not value:
        return None
    if value not in ("0", "1"):
        raise UserError(f"MEDDINOV3_CHECKPOINTING must be 0 or 1, got {value!r}.")
    return value == "1"
