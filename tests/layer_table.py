"""The table of layers in docs/layers.md, made of the tests that show what it says.

python tests/layer_table.py    # writes it

Every row names tests; what was tried stands in their parameters. A row without a test is an error,
and the suite holds the committed file to this.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "layers.md"


class Row(NamedTuple):
    """A kind of layer, the block that it gets, and the tests of it: names, or names[pattern]."""

    layer: str
    block: str
    tests: tuple[str, ...]


PRODUCT = "one Kronecker product"
LOOSE = "exact block (diagonal beyond 1,024 parameters), from per-sample gradients one by one"

ROWS = (
    Row(
        "`Linear`, any leading dimensions",
        PRODUCT,
        ("test_linear_with_any_leading_dimensions", "test_model_that_is_itself_a_layer"),
    ),
    Row("`Bilinear`", PRODUCT, ("test_bilinear",)),
    Row("`Conv2d`", PRODUCT, ("test_conv2d",)),
    Row("`Conv1d`", PRODUCT, ("test_convolutions_of_all_kinds[Conv1d",)),
    Row("`Conv3d`", PRODUCT, ("test_convolutions_of_all_kinds[Conv3d",)),
    Row("`ConvTranspose1d`", PRODUCT, ("test_convolutions_of_all_kinds[ConvTranspose1d",)),
    Row("`ConvTranspose2d`", PRODUCT, ("test_convolutions_of_all_kinds[ConvTranspose2d",)),
    Row("`ConvTranspose3d`", PRODUCT, ("test_convolutions_of_all_kinds[ConvTranspose3d",)),
    Row(
        "grouped and depthwise convolutions",
        "one Kronecker product a group, zero between groups; with one output a group that is F",
        (
            "test_grouped_convolutions",
            "test_depthwise_convolutions_called_twice_and_not_always",
        ),
    ),
    Row(
        "`LayerNorm`, `RMSNorm`, `GroupNorm`, `BatchNorm` in eval mode",
        "exact block; exact diagonal beyond 1,024 parameters",
        (
            "test_normalisation_layers_are_exact",
            "test_large_normalisation_layers_get_their_diagonal",
        ),
    ),
    Row(
        "`BatchNorm` in train mode",
        "an error: samples are not independent",
        ("test_bad_input_is_named[batch norm]",),
    ),
    Row(
        "`Embedding`, up to 1,024 tokens",
        PRODUCT,
        ("test_small_vocabularies_in_full",),
    ),
    Row(
        "`Embedding`, larger",
        "left factor (x) diagonal over the vocabulary: the closest of that structure, and of all "
        "with one token a sample",
        ("test_large_vocabularies_by_diagonals", "test_a_vocabulary_of_fifty_thousand"),
    ),
    Row(
        "`Embedding` of positions, one row of ids for all samples, beyond 65,536 parameters",
        "as any other; smaller ones as parameters of no layer's",
        ("test_positions_are_treated", "test_a_tracker_and_several_passes_and_batches"),
    ),
    Row(
        "`Embedding` tied to a `Linear` head",
        "one block for both uses, as for embeddings",
        ("test_tied_weights", "test_tied_weights_of_large_vocabularies"),
    ),
    Row(
        "`Embedding(scale_grad_by_freq=True)`, frozen layers",
        "skipped, with the reason",
        ("test_what_cannot_be_treated",),
    ),
    Row(
        "`Embedding(max_norm=...)`, `EmbeddingBag`",
        LOOSE,
        ("test_what_cannot_be_treated",),
    ),
    Row(
        "`MultiheadAttention`",
        "a product for the three projections of self-attention together, one for each of "
        "cross-attention, and one for `out_proj`",
        ("test_attention[", "test_as_many_steps_as_samples"),
    ),
    Row(
        "`MultiheadAttention(kdim=..., add_bias_kv=..., add_zero_attn=...)`",
        LOOSE,
        ("test_other_attention_sample_by_sample_or_skipped",),
    ),
    Row(
        "`TransformerEncoder(Layer)`, `TransformerDecoderLayer`",
        "layer by layer",
        ("test_transformer_encoder", "test_transformer_decoder_layer"),
    ),
    Row(
        "transformers' `Conv1D`",
        PRODUCT,
        ("test_every_layer_of_gpt2", "test_frozen_bias_of_conv1d"),
    ),
    Row(
        "transformers' `...RMSNorm`",
        "exact block; exact diagonal beyond 1,024 parameters",
        ("test_every_treated_layer_is_exact[llama]", "test_every_treated_layer_is_exact[moe]"),
    ),
    Row(
        "layers over windows, frames or patches folded into the batch; with the sequence first; of "
        "packed or ragged sequences; experts of any routing; samples in a loop",
        "as where the rows are the samples: a sample's rows are its positions",
        ("test_rows_with_owners_are_layers", "test_beyond_the_limit_of_single_gradients"),
    ),
    Row(
        "routers, experts in one tensor, by `functional.linear` or `grouped_mm`",
        "one Kronecker product; one for each expert",
        ("test_rows_with_owners_are_layers[fused", "test_owners_in_other_precisions[Fused"),
    ),
    Row(
        "layers whose rows mix samples (logits of a batch, graphs over it); outputs that are "
        "gradients; hooks and replaced forwards that change an output",
        LOOSE,
        ("test_what_is_no_layer_is_exact_or_left_out", "test_a_global_hook_is_found"),
    ),
    Row(
        "`LSTM`, `GRU`, `RNN`, cells; raw parameters; parametrised weights; adapters; weights used "
        "outside of their layer",
        LOOSE,
        ("test_exact_sample_by_sample",),
    ),
    Row(
        "the same beyond 65,536 parameters in all",
        "skipped, with the reason",
        ("test_too_many_parameters_are_skipped_or_refused_by_name",),
    ),
    Row(
        "a layer called twice; modules that hold the same parameters",
        "one block, positions side by side",
        ("test_layer_called_twice", "test_layers_with_the_same_parameters_are_one"),
    ),
    Row(
        "weight frozen, bias trained; bias frozen",
        "the exact block of the bias; the product without the bias",
        (
            "test_frozen_weight_leaves_the_bias_alone",
            "test_frozen_bias_leaves_the_weight_alone",
        ),
    ),
    Row(
        "a parameter that is named in `layers=`",
        "that of its layer without the others; of a bias F itself",
        ("test_every_block_is_of_one_parameter", "test_a_weight_tied_to_an_embedding"),
    ),
    Row(
        "checkpointed regions (`use_reentrant=False`)",
        "as without",
        ("test_checkpointed_regions_are_exact",),
    ),
    Row(
        "checkpointed regions (`use_reentrant=True`)",
        "an error that says what to do",
        ("test_reentrant_checkpoints_are_refused_with_the_way_out",),
    ),
    Row("`torch.compile`", "as without", ("test_compiled_models_are_exact",)),
    Row("a module of your own, by `kfoc.register`", "as you say", ("test_a_layer_of_ones_own",)),
)

HEAD = """\
# Layers

What block each kind of layer gets, and what was tried. Every block is held, in float64, against
per-sample gradients by autograd, F formed from them, and the singular value decomposition of its
rearrangement. `python tests/layer_table.py` writes this page from the tests; the suite checks it.

A layer that has no block is in `curvature.skipped` with the reason, or an error where it was named
in `layers=`; `print(curvature.coverage)` counts parameters.

| layer | block | tried | tests |
|---|---|---|---:|
"""


def collected() -> list[str]:
    """The names of all tests of the suite, with their parameters."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts="]
    found = subprocess.run(
        [*command, str(TESTS)], capture_output=True, text=True, check=True, cwd=TESTS.parent
    )
    return [line.partition("::")[2] for line in found.stdout.splitlines() if "::" in line]


def tried(names: list[str]) -> str:
    """The parameters of tests, each once."""
    parameters = [match[1] for name in names if (match := re.search(r"\[(.*)\]", name))]
    words = dict.fromkeys(word for each in parameters for word in each.split("-"))
    plain = re.compile(r"[\d.e+]+|estimator\d|\d+x.*|Conv.*|scalar")
    return "; ".join(word for word in words if word and not plain.fullmatch(word))


def _is_of(name: str, test: str) -> bool:
    return name == test or name.startswith(test if "[" in test else f"{test}[")


def page() -> str:
    names = collected()
    lines = []
    for row in ROWS:
        matching = [name for name in names if any(_is_of(name, test) for test in row.tests)]
        missing = [test for test in row.tests if not any(_is_of(name, test) for name in names)]
        if missing:
            raise ValueError(f"{row.layer}: there is no test {', '.join(missing)}")
        lines.append(f"| {row.layer} | {row.block} | {tried(matching)} | {len(matching)} |")
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
