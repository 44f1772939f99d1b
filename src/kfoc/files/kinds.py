"""The names that files have for what states are made of: short ones, so that classes may move.

A new class of states, or of what they hold, needs an entry. A name stays with its class.
"""

from __future__ import annotations

# Name in files -> the module below the package, and the class.
KINDS = {
    # Samples of layers, by which new ones are held.
    "Rows": "samples.inputs:Rows",
    "Folded": "samples.inputs:Folded",
    "Patches": "samples.patches:Patches",
    "OneHot": "samples.one_hot:OneHot",
    "Samples": "samples.linear:Samples",
    "Grouped": "samples.grouped:Grouped",
    "Depthwise": "samples.grouped:Depthwise",
    "Direct": "samples.direct:Direct",
    "Tied": "samples.tied:Tied",
    # Estimators, and their states.
    "KFAC": "estimators.kfac:KFAC",
    "KFAC state": "estimators.kfac:_State",
    "KFAC tied state": "estimators.kfac:_TiedState",
    "KFOC": "estimators.kfoc:KFOC",
    "KFOC approx": "estimators.aggregation:Approx",
    "KFOC running": "estimators.running:Running",
    "KFOC online": "estimators.online:Online",
    "KFOC exact": "estimators.exact:Exact",
    "KFOC sums": "estimators.sums:Sums",
    "KFOC exact sums": "estimators.sums:ExactSums",
    "head and tail": "estimators.head:Head",
    "pieces": "nearest.pair:Pieces",
    "KFOC pending": "estimators.pending:Pending",
    "power iteration": "nearest.power:PowerIteration",
    "KroneckerFit": "nearest.power:KroneckerFit",
    "Diagonal": "estimators.diagonal:Diagonal",
    "Diagonal state": "estimators.diagonal:_State",
    "BlockDiagonal": "estimators.block_diagonal:BlockDiagonal",
    "BlockDiagonal state": "estimators.block_diagonal:_State",
    "EigenCorrected": "estimators.eigen_corrected:EigenCorrected",
    "EigenCorrected state": "estimators.eigen_corrected:_State",
    "groups state": "estimators.factored:_Groups",
    "rows state": "estimators.rows:Rows",
    "positions state": "estimators.factored:_AsPositions",
    "Footprint": "errors:Footprint",
    "layer in a fit": "fitting.layer_fit:LayerFit",
    "Probes": "estimators.certificate:Probes",
    "Mark": "fitting.marks:Mark",
    # Blocks, damped ones, and an optimizer's inverses of them.
    "KroneckerBlock": "blocks.kronecker:KroneckerBlock",
    "KroneckerDiagonalBlock": "blocks.kronecker:KroneckerDiagonalBlock",
    "GroupedBlock": "blocks.grouped:GroupedBlock",
    "DiagonalBlock": "blocks.diagonal:DiagonalBlock",
    "DenseBlock": "blocks.dense:DenseBlock",
    "EigenBlock": "blocks.eigen:EigenBlock",
    "LowRankBlock": "blocks.low_rank:LowRankBlock",
    "Report": "blocks.base:Report",
    "Spectrum": "blocks.spectrum:Spectrum",
    "ProductBasis": "blocks.spectrum:ProductBasis",
    "DenseBasis": "blocks.spectrum:DenseBasis",
    "Damping": "blocks.damped:Damping",
    "DampedSpectrum": "blocks.damped:DampedSpectrum",
    "DampedGroups": "blocks.grouped:DampedGroups",
    "Layout": "parameters.layout:Layout",
    "Preconditioner": "applications.preconditioner:Preconditioner",
    "FactoredInverse": "applications.preconditioner:FactoredInverse",
    "GroupedInverse": "applications.preconditioner:GroupedInverse",
    "DampedInverse": "applications.preconditioner:DampedInverse",
}
