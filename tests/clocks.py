"""A clock that does not depend on the machine: what a run costs is what torch's counter says of it."""

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fxprune.passes.capture.patches import visible
from fxprune.passes.capture.recorder import Recorder

SECONDS = 1e-9  # for each operation


def counting_clock(runs, device, *, least=7, seconds=0.4):
    """As `fxprune.selection.latency.measure_seconds`, with a nanosecond for each operation of a product."""
    found = []
    for run in runs:
        with visible(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run()
        found.append([counter.get_total_flops() * SECONDS] * least)
    return found


def clock_of_calls(runs, device, *, least=7, seconds=0.4):
    """Likewise, with a nanosecond for each call of the dispatcher, however much it computes."""
    found = []
    for run in runs:
        with visible(), Recorder({}) as recorder:
            run()
        found.append([len(recorder.op_trace.ops) * SECONDS] * least)
    return found
