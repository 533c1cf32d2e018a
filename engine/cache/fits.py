"""Whether a method can learn from a form of recorded answers, and if not, why."""

from __future__ import annotations

from ..methods import Method
from .forms import Form


def refusal(method: Method, form: Form) -> str:
    """What keeps a method from a form, with the cure; "" for nothing."""
    takes = method.takes_recorded
    if takes == "none":
        return (
            f"method {method.name} needs more of its teacher than what can be recorded; give it a "
            "checkpoint in place of teacher.cache"
        )
    if form.temperature is not None:
        own = getattr(method, "temperature", None)
        if own != form.temperature:
            return (
                f"the cache holds probabilities at T = {form.temperature:g}, and method "
                f"{method.name} has T = {own}; set method.temperature={form.temperature:g} or "
                "record them anew"
            )
    if form.whole:
        return ""
    if takes == "whole":
        return (
            f"method {method.name}, as set, needs all logits of a teacher, and the cache holds "
            f"{form.form}; record it with cache.form=full"
        )
    if form.rest == "bucket" and form.form == "top_k" and method.name != "kd":
        return (
            f"cache.rest=bucket is defined for method kd alone, not for {method.name}; record it "
            "with cache.rest=spread"
        )
    if method.splits_target and not form.label:
        return (
            f"method {method.name} treats the label's probability apart, and the cache has it only "
            "where it was listed; record it with cache.label=true"
        )
    if form.form == "sampled" and (why := method.nonlinear):
        return (
            f"drawn answers are right in the mean only where a loss is linear in them, and method "
            f"{method.name} is not: {why}; record it with cache.form=top_k or full"
        )
    return ""
