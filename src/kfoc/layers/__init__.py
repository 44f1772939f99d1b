"""From a module to its samples: a file a family of layers, whose rules are registered here."""

from kfoc.layers import (
    attention,  # noqa: F401
    convolution,  # noqa: F401
    embedding,  # noqa: F401
    linear,  # noqa: F401
    normalisation,  # noqa: F401
    transformers,  # noqa: F401
)
