"""Gur-Ari, Roberts & Dyer 2018, reproduced."""

from typing import Final

from benchmarks.papers.gur_ari_2018.claims import CLAIMS
from benchmarks.papers.gur_ari_2018.pictures import EXHIBITS
from benchmarks.papers.gur_ari_2018.sizes import RUNS
from benchmarks.papers.reproduction import Paper, paragraphs

_DIFFERENCES: Final = """
MNIST is 5,000 images of the 60,000, so that 78 steps are an epoch: the training loss falls sooner,
and a thousand steps go further into fitting single images.

CIFAR-10 is 1,000 images (ConvNet), 3,000 (its rows of Table 1) or 300 (ResNet-18), averaged to
16x16 pixels. The ConvNet has half of the paper's widths, ResNet-18 a sixteenth. A ConvNet of 16x16
pixels has fewer weights in its dense layer.

Pixels are standardised; the paper does not say what it does.

Gradient and Hessian are over all training images, as in the paper. Those with batch norm have the
statistics of batches of up to 1,000, and dropout has one fixed mask.

Table 1 and Figure 12: 3,000 steps, of which the last 1,000 count in the table, at every 50th
(changed after a first trial at one seed: of 1,500 steps the last 1,000 began where the overlap was
still rising at η = 0.01). The rate of Adam (0.001), the size of the regression's data (1,000), and
its loss (half the squared error) are ours: the paper gives none.

Subspaces are taken at 6 to 12 steps, to a residual of 1e-4 (FC) or 1e-3 (ConvNet, ResNet-18) of the
largest eigenvalue; f_top of Figure 12 and the largest eigenvalue itself to 1e-2. Two solves at the
end tell how sharply that determines the next k.

A small network has images of 7x7 pixels, so that its whole spectrum can be taken. Random labels
are those of 1,000 images, trained on for 1,000 epochs (changed after a first trial at one seed: of
5,000 images in 40 epochs it fitted 15 %, where the paper's network fits them); a network that fits
fewer than 90 % of its labels decides nothing.

In the place of CIFAR-100 there is a mixture of 20 Gaussians in 32 dimensions, with 20 realisations
instead of 200, and 80 eigenvalues of each instead of 1,000.

Outliers are counted by the largest ratio of neighbours among the top 3k eigenvalues, where the
paper reads them off a picture. One fewer than classes counts as well: the paper leaves that open.

Equations 8 and 17 print four times the gradient that the middle of equation 17 has. Both are
measured, as two claims.

The mixtures have 50 samples of a class; the paper does not say how many.

Low-rank Newton (eq. 11) is only proposed in the paper: the comparison is ours. Steps that leave
the loss as it is do not count as climbing (changed after a first trial at one seed: after three
steps the loss stayed where it was, and each further step was a failure).
"""

PAPER: Final = Paper(
    key="gur_ari_2018",
    citation="Gur-Ari, Roberts & Dyer 2018, Gradient Descent Happens in a Tiny Subspace",
    address="https://arxiv.org/abs/1812.04754",
    runs=RUNS,
    exhibits=EXHIBITS,
    claims=CLAIMS,
    differences=paragraphs(_DIFFERENCES),
)
