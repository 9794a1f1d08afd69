"""Sagun, Evci, Guney, Dauphin & Bottou 2017, reproduced."""

from typing import Final

from benchmarks.papers.reproduction import Paper, paragraphs
from benchmarks.papers.sagun_2017.claims import CLAIMS
from benchmarks.papers.sagun_2017.pictures import EXHIBITS
from benchmarks.papers.sagun_2017.sizes import RUNS

_DIFFERENCES: Final = """
Of the clusters the paper gives the dimension, the numbers and the scale of the covariance. Ours
have standard normal centres and 1,000 examples together, and all networks train for 10,000 steps at
a rate of 0.1, in batches of 10 with SGD: rate, steps, batches and stopping are not told.

The largest gap and the largest ratio are looked for among the C + 30 largest eigenvalues, since
ratios between numbers next to nothing can be any. The heuristic is not defined in the paper: here
it is the point of the scree plot farthest below its chord.

The networks of Figures 1 and 4 to 6 have images of 14x14 pixels, 1,000 of MNIST, and two hidden
layers of 8 to 96 units. Their training ends at a loss of 0.01: the paper's sizes, rate and stopping
condition are not told. The whole spectrum is taken up to 6,000 parameters, of the others the 30
largest eigenvalues and the smallest, to a residual of 0.001 of the largest.

The convnet of Figures 7 and 8 sees 1,000 images of 14x14 pixels and has 1,642 parameters, so that
its Hessian can be written out; batches are of 500 and 20.

The two parts of Figure 9 are of 3,000 steps each instead of 25,000, on 4,000 images of CIFAR-10 at
16x16 pixels instead of 50,000 at 32x32; a large batch is of 500. The network has three convolutions
and one hidden dense layer, some 15,000 parameters.

Networks on clusters of both covariances train for as many steps, and so end at different losses:
those of covariance 10 at several times those of covariance 1.

The split of the Hessian, the trivial eigenvalues and the random matrices are only argued in the
paper: data and sizes of these runs are ours. The eigenpairs of the split have a residual of 0.01 of
the largest eigenvalue.
"""

PAPER: Final = Paper(
    key="sagun_2017",
    citation="Sagun, Evci, Guney, Dauphin & Bottou 2017, Empirical Analysis of the Hessian of "
    "Over-Parametrized Neural Networks",
    address="https://arxiv.org/abs/1706.04454",
    runs=RUNS,
    exhibits=EXHIBITS,
    claims=CLAIMS,
    differences=paragraphs(_DIFFERENCES),
)
