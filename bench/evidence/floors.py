"""The floors of the evidence on the digits: what a trial in plain PyTorch reached in every run."""

from statistics import mean

PRI = ("pri2", "pri4", "pri7")
SPARSE = ("smi", *PRI)
SPEEDUPS = {"smi": 2.3, "pri2": 2.1, "pri4": 4.5, "pri7": 7.5}  # over dense, reference engine, one thread
FLOPS = 0.02  # largest deviation from the cost model
QUANTISED = 0.015  # largest loss against full precision


def failures(rows: list[dict], data: str = "digits") -> list[str]:
    """What lies below its floor, in words; floors of rows and columns that are not there are named as missing."""
    found = {row["method"]: {name: mean(values) for name, values in row.items() if isinstance(values, list)} for row in rows}
    wrong = [line for method in found for line in _common(method, found[method])]
    if data != "digits":
        return wrong
    least = [("copy", method, 0.90) for method in SPARSE] + [("copy", "dense", 0.87)]
    least += [("small", method, 0.65) for method in SPARSE] + [("small", "dense", 0.55)]
    least += [("speedup", method, floor) for method, floor in SPEEDUPS.items()]
    most = [("copy", "gaussian", 0.78), ("small", "gaussian", 0.35)]
    for column, method, bound, sign in [(*item, 1) for item in least] + [(*item, -1) for item in most]:
        value = found.get(method, {}).get(column)
        if value is None:
            wrong.append(f"{column} of {method} was not measured")
        elif not sign * value >= sign * bound:  # NaN, too
            wrong.append(f"{column} of {method} is {value:.3f}, {'at least' if sign > 0 else 'at most'} {bound} is asked")
    if {"pri4", "smi"} <= found.keys() and found["pri4"].get("copy", 1.0) < found["smi"].get("copy", 0.0) - 0.03:
        wrong.append(f"copy of pri4 is {found['pri4']['copy']:.3f}, more than 3 points below smi's {found['smi']['copy']:.3f}")
    return wrong


def _common(method: str, columns: dict[str, float]) -> list[str]:
    """FLOPs as the cost model counts them, and no loss at eight bits of activations."""
    if method == "gaussian":
        return []
    asked = ("full", "w8a8", "w4a8") if method == "real" else ("full", "w8a8", "w4a8", "flops_ratio")
    wrong = [f"{name} of {method} was not measured" for name in asked if name not in columns]
    if not abs(columns.get("flops_ratio", 1.0) - 1) <= FLOPS:
        wrong.append(f"FLOPs of {method} are {columns['flops_ratio']:.3f} of the cost model's")
    for name in ("w8a8", "w4a8"):
        if {name, "full"} <= columns.keys() and not columns["full"] - columns[name] <= QUANTISED:
            wrong.append(f"{name} of {method} is {columns[name]:.3f}, full precision {columns['full']:.3f}")
    return wrong
