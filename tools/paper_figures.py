"""ByteScale's published figures (arXiv 2502.21231), for reproduce_paper.py.

Speed-ups over its static baseline are read off Figures 17 and 20; models are from its Table 1. tp,
pp and the exact number of GPUs in the last panel ("more than 12K") are our choice; see
reproduce_paper.py.
"""

from __future__ import annotations

from dataclasses import dataclass

CONTEXTS = (2**18, 2**19, 2**20, 2**21)
DATASETS = ("github-like", "byted-like")
# Fig. 20: cumulative speedups for 7B, 2M, Byted.
ABLATION = {"dynamic communication": 1.59, "selective offload": 2.01, "balance": 3.69}


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A row of the paper's Table 1 plus our choices. MLP widths are those of the real models."""

    layers: int
    hidden: int
    intermediate: int  # of all active experts
    tp: int
    pp: int
    gpus: int
    # Fig. 17: (naive, balance) speedup per context.
    github: tuple[tuple[float, float], ...]
    byted: tuple[tuple[float, float], ...]

    @property
    def ranks(self) -> int:
        return self.gpus // (self.tp * self.pp)

    def paper(self, dataset: str) -> tuple[tuple[float, float], ...]:
        return self.github if dataset == "github-like" else self.byted


MODELS = {
    "7B": Model(
        layers=32, hidden=4096, intermediate=11008, tp=2, pp=1, gpus=1024,
        github=((1.28, 1.73), (1.51, 2.49), (2.25, 4.56), (3.96, 7.89)),
        byted=((1.23, 1.68), (1.42, 1.98), (1.61, 2.34), (2.43, 4.26)),
    ),
    "13B": Model(
        layers=40, hidden=5120, intermediate=13824, tp=4, pp=1, gpus=2048,
        github=((1.26, 1.65), (1.50, 2.22), (2.59, 4.15), (3.67, 6.88)),
        byted=((1.21, 1.53), (1.26, 1.69), (1.51, 2.28), (2.27, 4.13)),
    ),
    "30B": Model(
        layers=60, hidden=6656, intermediate=17920, tp=8, pp=1, gpus=4096,
        github=((1.18, 1.54), (1.28, 2.07), (2.15, 3.48), (3.39, 6.21)),
        byted=((1.17, 1.49), (1.23, 1.58), (1.62, 2.06), (2.30, 3.80)),
    ),
    "70B": Model(
        layers=80, hidden=8192, intermediate=28672, tp=8, pp=2, gpus=8192,
        github=((1.19, 1.41), (1.41, 1.89), (1.98, 3.05), (2.45, 4.28)),
        byted=((1.22, 1.52), (1.24, 1.70), (1.26, 1.93), (1.79, 2.84)),
    ),
    "8x7B": Model(
        layers=32, hidden=4096, intermediate=2 * 14336, tp=8, pp=2, gpus=8192,
        github=((1.15, 1.46), (1.18, 1.52), (1.27, 1.84), (1.98, 3.42)),
        byted=((1.17, 1.45), (1.20, 1.63), (1.27, 1.75), (1.35, 2.18)),
    ),
    "8x22B": Model(
        layers=56, hidden=6144, intermediate=2 * 16384, tp=8, pp=2, gpus=12288,
        github=((1.12, 1.28), (1.27, 1.59), (1.86, 2.72), (2.75, 4.13)),
        byted=((1.15, 1.34), (1.20, 1.47), (1.35, 1.73), (1.67, 2.41)),
    ),
}  # fmt: skip
