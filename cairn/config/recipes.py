"""The `data` and `model` sections of vision and GAN recipes."""

from typing import Literal, Self

from pydantic import Field, model_validator

from cairn.config.base import Section


class DigitsSection(Section):
    """scikit-learn's bundled digits: 1,797 grey 8 x 8 images in ten classes."""

    name: Literal["digits"] = "digits"
    held_out: float = Field(0.2, gt=0, lt=1)
    """Share of the images kept for validation."""


class ViTSection(Section):
    """A vision transformer (arXiv 2010.11929): patches, a class token, the transformer core."""

    name: Literal["vit"] = "vit"
    patch_size: int = Field(2, ge=1)
    """Side of a square patch, in pixels."""
    n_layer: int = Field(4, ge=1)
    """Transformer blocks."""
    n_head: int = Field(4, ge=1)
    """Attention heads."""
    d_model: int = Field(64, ge=1)
    """Width of the residual stream."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout after embeddings and sub-layers."""

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.d_model % self.n_head:
            raise ValueError(f"d_model {self.d_model} is not a multiple of n_head {self.n_head}")
        return self


class DCGANSection(Section):
    """A deep convolutional GAN (arXiv 1511.06434), sized to the images."""

    name: Literal["dcgan"] = "dcgan"
    d_latent: int = Field(64, ge=1)
    """Length of the noise vector."""
    n_channel: int = Field(16, ge=4, multiple_of=4)
    """Channels of the widest feature map over 4; a multiple of 4, the groups of their norms."""
