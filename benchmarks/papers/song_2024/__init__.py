"""Song, Ahn & Yun 2024, reproduced."""

from typing import Final

from benchmarks.papers.reproduction import Paper, paragraphs
from benchmarks.papers.song_2024.claims import CLAIMS
from benchmarks.papers.song_2024.pictures import EXHIBITS
from benchmarks.papers.song_2024.sizes import RUNS

_DIFFERENCES: Final = """
Rates, minibatches (50), and the widths of MLP, CNN and transformer are the paper's. VGG11 has an
eighth of the usual width, no batch norm and the initialisation of He et al. 2015; ResNet8 has half
of the usual width. The data are smaller where the table of sizes says so, so that a CPU will do;
"pool 2" are CIFAR-10 images of 16x16, averaged.

MNIST-5k is a balanced subset of the training set, not its first 5,000 images; what is less than
5,000 images of CIFAR-10 has as many of each class too.

χ_k is measured every so many steps ("look", "measure"), and its moving average, which starts at 0,
is over the measured values, with a factor of 0.5; the paper's is presumably over steps, with 0.9.
Where it does not reach 0.95 by the last step of the warm-up, the switch is there. (In a first trial
the average started at the first value, and networks whose gradient is dominant at random were
switched at step 1.)

What a projection achieves is only judged where SGD's gradient is dominant, as in the paper: the
mean of χ_k after the switch is at least 0.9.

The branches after the switch are shorter than the paper's, so that their losses are nearer to each
other; what is compared is their decrease, from the mean over the first fifth of the steps to that
over the last, since single losses jump by as much as that.

The projecting optimizers keep their basis for as long as it serves (`refresh="auto"`, within an
angle of 0.05); the paper finds it anew at every step.

The transformer at a small rate has 100 examples, so that two minibatches are an epoch: SGD hardly
differs from GD there.

Cross-entropy, VGG11 and ResNet8 are without Bulk-SGD, as in the paper.

The Hessian of ResNet8 is that of the mean loss over batches of 50, each with its own batch
statistics, which is what training minimises.

The toy quadratic is run for 20,000 steps; the paper does not say for how many.

Effective rates are of every 50th of the first 1,000 steps, in float64, with eigenvectors to a
residual of 1e-7: where little of the gradient is dominant, Dom-LR divides by the square of that
little. In a first trial with the usual 1e-3, and a basis kept for some steps, what such a basis
lets in of the bulk made Dom-LR of GD with momentum five times too large.

The figures of the paper's Tables 2 and 3 are missing in the text that we have.

SAM-edge is the corrected formula, with ρ: ‖g‖/(2ρ) · (√(1 + 8ρ/(η‖g‖)) − 1).

Figure 8 is an illustration, without data.
"""

_OUTCOME: Final = """
Where the gradient of SGD is dominant, the paper's central result comes out in MLP and CNN. From the
switch on Dom-SGD achieves at most 0.06 of the decrease of SGD, and Bulk-SGD 0.96 to 1.02 of it;
with cross-entropy Dom-SGD achieves at most 0.12. At the edge of SAM it is so too (Dom-SAM at most
0, Bulk-SAM 1.2 to 1.5 of SAM). The alignment comes of the minibatches' noise: where SGD is switched
to GD, χ_10 falls from 0.98 to 2e-5, and it comes back with SGD, while λ_1 hardly changes at the
switch. In the transformer, momentum and Adam raise Bulk-LR in the order of Table 1, to means within
a fifth of the paper's. The larger it is, the faster is training, in all three networks (rank
correlations of 0.8 to 1); in one of nine comparisons momentum does not raise that of Adam.

Elsewhere the premise is not met, or the outcome is not clear. After the switch the mean of χ_2 is
below 0.03 in the transformer, and that of χ_10 below 0.9 in ResNet8, so that these decide nothing
on projections; in VGG11 it is above, but the loss of SGD goes up and down by more than it falls in
so few steps. So does that of GD at its edge of stability, where sharpness and alignment are as in
the paper, and Dom-GD achieves 0.06 to 0.59 of the decrease of GD.
"""

_NOT_ALIGNED: Final = "The transformer is not aligned, so that it decides nothing."
_CAUSES: Final = {
    "low-rank": """
        In ResNet8 the eigenvalues fall off gradually, past the k-th as before it.
    """,
    "alignment": """
        MLP, CNN and VGG11 are aligned, though the MLP from 600 to 1,600 steps on and the CNN from
        6,000 to 8,000, rather than after a few. In ResNet8, after the start, χ_k stays below 0.88
        and 0.82 at seeds 0 and 2, and goes up and down between 0.44 and 0.96 at seed 1, so that its
        average does not reach the 0.95 of a switch, which then is at the last step; why is not
        known. The transformer is not aligned at all: at η = 0.001 SGD moves little along its
        dominant directions, which relax in 1/(ηλ), about 100 steps. Three trials at seed 0, of
        which no raw figures were kept, did not tell why the paper's is. Up to step 2,018 χ_k was
        0.01 to 0.17 with minibatches drawn with replacement, so that it is not that their noise
        adds up to nothing over an epoch; it was 0.09 to 0.96 with η = 0.01; and with 1,000
        examples, as in the paper, it was below 0.04 at step 518.
    """,
    "dom-fails": """
        The transformer and ResNet8 are not aligned, so that they decide nothing. VGG11 at its rate
        goes up and down so much that fifty steps of SGD need not lower the loss.
    """,
    "alignment-ce": """
        The transformer is not aligned, as with squared error. The CNN is; the MLP is at two seeds
        of three, 0.89 to 0.91 on average, since its χ_k falls at single steps, at seed 0 to 0.6.
    """,
    "dom-fails-ce": """
        In the MLP, at seed 2, the loss of Dom-SGD is 3 % lower from the fortieth step on than
        before, and stays there; between the fifths that is 0.12 of what SGD achieves. The
        transformer is not aligned, so that it decides nothing.
    """,
    "bulk-works": _NOT_ALIGNED,
    "dom-stays-near": _NOT_ALIGNED,
    "bulk-goes-as-far": _NOT_ALIGNED,
    "edge-dom-fails": """
        Dom-GD takes away what the ups and downs along the dominant directions add to the loss, and
        goes hardly further: over the last half of a branch it climbs by a tenth, stands still, and
        falls by 2 % at seeds 0, 1 and 2. That is 0.06, 0.59 and 0.20 of the decrease of GD, whose
        loss goes up and down by more than it falls in 600 steps, so that shares of its fall are
        rough.
    """,
    "momentum-amplifies": """
        In the MLP, at seed 2, Adam's mean Bulk-LR is 0.24 with momentum and 0.28 without. With
        momentum its deviation is 0.7 of its mean, so that a mean over 20 steps is rough; but over
        100 steps, in a trial of which no raw figures were kept, both are equal (0.286 and 0.287).
    """,
    "sam-edge-falls": """
        A slip: SAM's edge rises with the gradient's norm, from 0 to 2/η, as the formula has it.
    """,
}

PAPER: Final = Paper(
    key="song_2024",
    citation="Song, Ahn & Yun 2024, Does SGD really happen in tiny subspaces?",
    address="https://arxiv.org/abs/2405.16002",
    runs=RUNS,
    exhibits=EXHIBITS,
    claims=CLAIMS,
    differences=paragraphs(_DIFFERENCES),
    outcome=paragraphs(_OUTCOME),
    causes=_CAUSES,
)
