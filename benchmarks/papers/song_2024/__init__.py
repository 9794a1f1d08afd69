"""Song, Ahn & Yun 2024, reproduced."""

from typing import Final

from benchmarks.papers.reproduction import Paper, paragraphs
from benchmarks.papers.song_2024.claims import CLAIMS
from benchmarks.papers.song_2024.pictures import EXHIBITS
from benchmarks.papers.song_2024.sizes import RUNS

_DIFFERENCES: Final = """
Widths, rates and minibatches (50) are the paper's. The data are smaller where the table of sizes
says so, so that a CPU will do; "pool 2" are CIFAR-10 images of 16x16, averaged.

MNIST-5k is a balanced subset of the training set, not its first 5,000 images.

χ_k is measured every so many steps ("look", "measure"), and the moving average is over the measured
values, with a smaller factor where they are few; the paper's is presumably over steps, with 0.9.
Where it does not reach 0.95 by the last step of the warm-up, the switch is there.

What a projection achieves is only judged where SGD's gradient is dominant, as in the paper: where
the mean of χ_k after the switch is below 0.9, the figure is NaN, and the claim not reproduced.

The branches after the switch are shorter than the paper's, so that their losses are nearer to each
other; what is compared is their decrease.

The projecting optimizers keep their basis for as long as it serves (`refresh="auto"`, within an
angle of 0.05); the paper finds it anew at every step.

Cross-entropy, VGG11 and ResNet8 are without Bulk-SGD, as in the paper.

VGG11 has a quarter of the usual width, no batch norm and the initialisation of He et al. 2015;
ResNet8 has half of the usual width.

The Hessian of ResNet8 is that of the mean loss over batches of 50, each with its own batch
statistics, which is what training minimises.

The toy quadratic is run for 20,000 steps; the paper does not say for how many.

Effective rates are measured in float64, and the speed of training is the mean logarithm of the loss
over the last 100 steps. Single losses at the edge of stability and along SGD go up and down: ends
are means. (Both were changed after a first trial at one seed, with single losses and float32.)

The means of Tables 1 to 3 are over every 20th or 40th of the first 1,000 steps, not over all; the
figures of the paper's Tables 2 and 3 are missing in the text that we have.

SAM-edge is the corrected formula, with ρ: ‖g‖/(2ρ) · (√(1 + 8ρ/(η‖g‖)) − 1).

Figure 8 is an illustration, without data.
"""

PAPER: Final = Paper(
    key="song_2024",
    citation="Song, Ahn & Yun 2024, Does SGD really happen in tiny subspaces?",
    address="https://arxiv.org/abs/2405.16002",
    runs=RUNS,
    exhibits=EXHIBITS,
    claims=CLAIMS,
    differences=paragraphs(_DIFFERENCES),
)
