"""A paper that does not exist, whose runs cost nothing."""

from matplotlib.figure import Figure

from benchmarks.papers.reproduction import Cause, Claim, Exhibit, Paper, Run


def measure(job, *, slope, points=(1, 2)):
    """A line through the origin; the seed is its noise."""
    values = [slope * point + 0.01 * job.seed for point in points]
    return {"slope": slope, "values": values, "nothing": float("nan"), "text": "a], b"}


def draw(raws):
    figure = Figure()
    axes = figure.subplots()
    for raw in raws["steep"].values():
        axes.plot(raw["values"])
    return figure


def table(raws):
    rows = [[str(seed), f"{raw['values'][0]:.2f}"] for seed, raw in raws["flat"].items()]
    return [["seed", "first"], *rows]


def first(raw):
    return raw["values"][0]


PAPER = Paper(
    key="made_up",
    citation="Nobody 1900, On lines",
    address="https://example.org",
    runs=(
        Run("steep", "a steep line", measure, {"slope": 2.0}, {"slope": 2.0, "points": (1, 9)}),
        Run("flat", "a flat line", measure, {"slope": 0.5}, {"slope": 0.5}, reading="by ruler"),
        Run(
            "eyed",
            "the same",
            measure,
            {"slope": 0.05},
            {"slope": 0.05},
            reading="by eye",
            reading_of="flat",
        ),
    ),
    exhibits=(
        Exhibit("figure-1", "A line", ("steep",), draw=draw, note="it goes up."),
        Exhibit("table-1", "Its values", ("flat",), table=table),
    ),
    claims=(
        Claim("up", "It goes up.", "eq. 1", "y(1)", ("steep", "flat"), first, at_least=0.3),
        Claim(
            "fast",
            "It goes up fast.",
            "eq. 2",
            "y(1)",
            ("steep", "flat"),
            first,
            at_least=1.0,
            threshold="Standing still is 0.",
            premise=lambda raw: raw["slope"] > 1,
        ),
        Claim(
            "near",
            "It is near 2.",
            "eq. 3",
            "y(1)",
            ("steep",),
            first,
            2.0,
            2.12,
            kind="identity",
            changed="It was 3.",
        ),
        Claim("two", "It is 2.", "eq. 3", "y(1)", ("steep",), first, 1.8, 2.2, kind="number"),
        Claim("flat", "It is flat.", "eq. 5", "y(1)", ("steep",), first, at_most=1.0, kind="ours"),
        Claim("empty", "0 of 0.", "eq. 4", "1/0", ("flat",), lambda _: 1 / 0, at_most=1.0),
    ),
    differences=("There is no paper.",),
    causes={
        "up": Cause("It is told."),
        "fast": Cause("It is slow.", ("eyed",), {"flat": ("two",)}),
        "flat": Cause("Nobody knows."),
    },
    came_out=("Lines go up.",),
    depends=("Some are steep.",),
    rules="`abc123`, of `steep` `def456`",
)
