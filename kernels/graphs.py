"""CUDA graphs: warmed up and captured on the one side stream of a device."""

from collections.abc import Callable
from functools import cache

import torch


@cache
def side_stream(index: int) -> torch.cuda.Stream:
    """The stream of device `index` on which graphs are made: one, because memory that the allocator frees on a stream is reused on that one only."""
    return torch.cuda.Stream(torch.device("cuda", index))


def capture(run: Callable[[], object], device: torch.device, warm_up: int, undo: Callable[[], object] = lambda: None) -> torch.cuda.CUDAGraph:
    """`run` as a CUDA graph of `device`, after `warm_up` calls of it, each of which `undo` follows.

    Raises what `run` raises. Afterwards, also where it does, device and stream are the current ones that they were.
    """
    failed: BaseException | None = None
    with torch.cuda.device(device):
        current, side = torch.cuda.current_stream(), side_stream(torch.cuda.current_device())
        side.wait_stream(current)
        with torch.cuda.stream(side):  # around the capture, too: where the end of a capture fails, torch.cuda.graph does not leave its stream
            for _ in range(warm_up):
                run()
                undo()
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, stream=side):  # without a stream it takes one of the first device that was ever captured on
                    try:
                        run()
                    except BaseException as error:
                        failed = error
                        raise
            except Exception:
                if failed is not None:
                    raise failed from None  # and not that the capture, which it ended, did not end well
                raise
    return graph
