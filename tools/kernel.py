"""What a lab's kernel starts with: the site's plots, one thread, warnings as errors."""

import functools
import os
import sys
import warnings

import matplotlib as mpl
import torch
import tqdm

from tools.figures import COLORS, style

torch.set_num_threads(1)
mpl.rcParams.update(style())
mpl.rcParams["axes.prop_cycle"] = mpl.cycler(color=COLORS)
mpl.rcParams["figure.facecolor"] = mpl.rcParams["axes.facecolor"] = "none"
# matplotlib_inline warns of itself, so that only what the lab calls may not warn.
for module in ("torch", "sklearn", "snippets", "__main__"):
    warnings.filterwarnings("error", module=module)
# The terminal behind the notebook, so that progress is seen there and kept nowhere.
# Private: ipykernel has no other name for it. Where that is gone, progress is unseen.
terminal = getattr(sys.stderr, "_original_stdstream_copy", None)
shown = open(os.devnull if terminal is None else os.dup(terminal), "w")  # noqa: SIM115
tqdm.tqdm.__init__ = functools.partialmethod(tqdm.tqdm.__init__, file=shown)
