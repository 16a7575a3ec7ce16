"""What came of all combinations, as a page for users."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

HEAD = """# Versions

Which versions were tried together, what the preset `auto` does in each on a CPU, and what the tests leave out there.
`make matrix` made this page: each line in an environment of its own, with the contract of upstream's patch points, and
the tests that compare tokens and samples with upstream's (`exact` by equality, `numerical` within its promise). No GPU.
"""
COLUMNS = ("chatterbox-tts", "transformers", "torch", "Python", "NumPy", "`auto` leaves out", "tests")


def page(results: Sequence[dict[str, Any]], refused: Sequence[dict[str, str]]) -> str:
    """Markdown: the table, notes by number, what is left out everywhere, what cannot be had."""
    notes: list[str] = []
    common = everywhere(results)
    lines = [HEAD, row(COLUMNS), row(["---"] * len(COLUMNS))]
    lines += [line(result, common, notes) for result in results]
    lines += ["", *(f"{number}. {note}" for number, note in enumerate(notes, 1))]
    if common:
        lines += ["", "## Left out in every line", ""]
        lines += [f"- {families}: `{name}`: {reason}" for (name, reason), families in sorted(common.items())]
    if refused:
        lines += ["", "## What does not go together", "", row(("versions", "why", "instead")), row(["---"] * 3)]
        lines += [row((each["versions"], each["reason"], each["way"])) for each in refused]
    return "\n".join(lines) + "\n"


def row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def line(result: dict[str, Any], common: dict[tuple[str, str], str], notes: list[str]) -> str:
    """One combination; a remark or reason that lines share is one note."""

    def note(text: str) -> str:
        if text not in notes:
            notes.append(text)
        return f"[{notes.index(text) + 1}]"

    asked, found = result["made of"]["combination"], result["versions"]
    cells = [found.get(name) or asked.get(name.removesuffix("-tts"), "") for name in ("chatterbox-tts", "transformers")]
    cells += [found.get("torch") or asked["torch"], ".".join((found.get("python") or asked["python"]).split(".")[:2])]
    cells.append(found.get("numpy") or asked["numpy"])
    if asked["chatterbox"] == "source":
        cells[0] = f"development branch {result['commit']}".strip()
    if asked["remark"]:
        cells[2] += " " + note(asked["remark"])
    if result["problem"]:
        return row([*cells, "", f"not run: {result['problem']}"])
    absent = [f"no {family}" for family, plan in result["plans"].items() if isinstance(plan, str)]
    skipped = [
        f"`{name}` ({families}) {note(reason)}"
        for (name, reason), families in by_reason(result["plans"]).items()
        if (name, reason) not in common
    ]
    told = f"{result['passed']} passed"
    if result["failed"]:
        names = [name.rpartition("::")[2] for name in result["failed"]]
        told += f", **{len(names)} failed**: {', '.join(names[:3])}" + (", …" if len(names) > 3 else "")
    told += "".join(f", {count} skipped {note(reason)}" for reason, count in result["skipped"].items())
    return row([*cells, ", ".join(absent + skipped), told])


def by_reason(plans: dict[str, Any]) -> dict[tuple[str, str], str]:
    """Families by the pass that is skipped and the reason for it; not where it has nothing to do with the family."""
    found: dict[tuple[str, str], list[str]] = {}
    for family, plan in plans.items():
        for name, step in plan.items() if isinstance(plan, dict) else ():
            if step["status"] == "skipped" and not step["reason"].startswith("it does not apply to"):
                found.setdefault((name, step["reason"]), []).append(family)
    return {key: ", ".join(families) for key, families in found.items()}


def everywhere(results: Sequence[dict[str, Any]]) -> dict[tuple[str, str], str]:
    """What every combination that ran skips for the same reason, for each family that it has."""
    each = [by_reason(result["plans"]) for result in results if result["plans"]]
    shared = set.intersection(*map(set, each)) if each else set()
    return {key: max((found[key] for found in each), key=len) for key in shared}
