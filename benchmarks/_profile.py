"""Where the time of a piece of work goes: operators of the torch profiler and our own kernels, in a few groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import getmembers, isfunction
from typing import Any
from unittest import mock

from upturn.engines._slots import StepPlan
from upturn.models.native import back, ops

GROUPS = {
    "linear layers": ("mm", "addmm", "linear", "_linear_pointwise", "mkldnn_linear", "product", "weight_gradient"),
    "attention": (
        *("bmm", "baddbmm", "_softmax", "_softmax_backward_data", "_scaled_dot_product"),
        *("attend", "tree_attend", "keep", "softmax_", "spread", "unspread", "collect"),
    ),
    "choice of tokens and their log-probs": ("sample", "logits_seen", "logits_back_"),
    "gathers": ("index", "index_put", "_index_put_impl_", "index_select", "index_add", "index_copy", "gather", "cat"),
    "copies and casts": ("copy_", "fill_", "zero_", "_to_copy", "clone"),
    "optimizer": ("_fused_adamw_", "linalg_vector_norm", "_foreach", "adamw", "add_gradient", "norm_of"),
}
OTHERS = "element-wise and the rest"


def group(operator: str) -> str:
    """The group of an operator such as `aten::mm`: an exact name, or the beginning of a longer one."""
    name = operator.rpartition("::")[2]
    for title, members in GROUPS.items():
        if name in members or any(len(member) > 8 and name.startswith(member) for member in members):
            return title
    return OTHERS


def shares(events: Iterable[tuple[str, float]]) -> dict[str, float]:
    """(operator, its own time) -> share of each group, largest first."""
    sums: dict[str, float] = {}
    for operator, took in events:
        sums[group(operator)] = sums.get(group(operator), 0.0) + took
    total = sum(sums.values()) or 1.0
    return {title: round(took / total, 4) for title, took in sorted(sums.items(), key=lambda item: -item[1])}


def of(work: Callable[[], object], *, on_gpu: bool = False) -> dict[str, float]:
    """Shares of one call, after one to warm up. On a GPU of the time of its kernels, by the operator they belong to."""
    from torch.profiler import ProfilerActivity, profile

    work()
    if on_gpu:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as seen:
            work()
        known = [event for event in seen.key_averages() if event.device_type.name == "CPU"]
        return shares((event.key, event.self_device_time_total) for event in known)
    with _kernels_seen(), profile(activities=[ProfilerActivity.CPU], acc_events=True) as seen:
        work()
    return shares((event.key, event.self_cpu_time_total) for event in seen.key_averages())


@contextmanager
def _kernels_seen() -> Iterator[None]:
    """The profiler knows torch's operators only; inside, each kernel is a region that it sees, not whole layers."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(StepPlan, "takes", lambda *args: False))
        for module in (ops, back):
            for name, kernel in getmembers(module, isfunction):
                if not name.startswith("_") and kernel.__module__ == module.__name__:
                    stack.enter_context(mock.patch.object(module, name, partial(_region, name, kernel)))
        yield


def _region(name: str, kernel: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    from torch.profiler import record_function

    with record_function(name):
        return kernel(*args, **kwargs)
