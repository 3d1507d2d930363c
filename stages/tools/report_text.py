"""The reports of a finished compression -> its verdict, table, gate and worst pairs as parts of a Markdown text."""

import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from stages.protocol.costs import CostsRecord, read_costs, read_variant_costs
from stages.protocol.evaluation import DENSE, EvaluationRecord, read_evaluation
from stages.protocol.variants import read_variants
from stages.protocol.verdict import FINETUNED, Verdict, judge
from stages.register.gate import run_limit_checks
from stages.register.policy import load_policy
from stages.register.variant_checks import run_variant_limits
from stages.report.markdown import markdown_table
from stages.report.table import HEADER, latency_to_text, protocol_to_text, to_rows
from stages.report.templates import WORDS
from stages.runtime.errors import InputError
from stages.tools.against import compare_reports
from stages.tools.earlier_reports import fetch_reports

ORDER = (DENSE, "pruned", FINETUNED)
MARKS = {True: "✓", False: "✗"}


@dataclass(frozen=True)
class FinishedReports:
    """The records of a finished compression."""

    folder: Path
    record: EvaluationRecord
    costs: CostsRecord

    @property
    def verdict(self) -> Verdict:
        """Judge the finetuned model."""
        return judge(self.record, self.costs)


def read_reports(folder: Path) -> FinishedReports:
    """Read evaluation and costs below a folder of reports.

    Raises:
        InputError: One is missing or damaged, or they are of other weights, or lack a model.
    """
    for file in ("evaluate/evaluation.json", "costs/costs.json"):
        if not (folder / file).is_file():
            raise InputError(f"{folder / file} does not exist; run the pipeline first, or give its folder by --reports")
    record, costs = read_evaluation(folder / "evaluate"), read_costs(folder / "costs")
    if missing := [name for name in ORDER if name not in record.models]:
        raise InputError(f"{folder}/evaluate lacks the model {missing[0]}; run the evaluate stage again")
    if costs.weights_sha256 != {name: model.weights_sha256 for name, model in record.models.items()}:
        raise InputError(f"{folder}/costs is of other weights than {folder}/evaluate; run the costs stage again")
    return FinishedReports(
        folder, record.model_copy(update={"models": {name: record.models[name] for name in ORDER}}), costs
    )


def write_comparison(found: FinishedReports, commit: str) -> str:
    """Compare with the reports of another commit.

    Raises:
        InputError: They cannot be read, or were measured under another protocol.
    """
    with tempfile.TemporaryDirectory() as temporary:
        fetch_reports(commit, found.folder, Path(temporary))
        return f"#### Against {commit}\n\n{compare_reports(Path(temporary), found.folder, commit)}"


def write_gate(found: FinishedReports, policy: Path) -> str:
    """Write whether the limits against the dense model are met; the champion is compared with at promotion.

    Raises:
        InputError: The policy is missing or invalid.
    """
    limits, folder = load_policy(policy), found.folder
    checks = list(run_limit_checks(found.record, lambda: found.costs, limits))
    if limits.variant is not None:
        costs = partial(read_variant_costs, folder / "costs")
        checks += run_variant_limits(found.record, lambda: read_variants(folder / "variants"), costs, limits.variant)
    failed = sum(not check.passed for check in checks)
    result = f"{failed} of {len(checks)} limits missed" if failed else f"all {len(checks)} limits met"
    rows = [[MARKS[check.passed], check.name, check.reason] for check in checks]
    table = markdown_table(["", "limit", "found"], rows, text_columns=3)
    return f"#### Gate: {result}\n\n{table}\n\nLimits of {policy}; the champion is compared with at promotion."


def write_table(found: FinishedReports) -> str:
    """Write the results table."""
    return markdown_table(HEADER, to_rows(found.record, found.costs))


def write_worst_pairs(found: FinishedReports) -> str:
    """Write the least similar pairs of the finetuned model."""
    pairs = found.record.models[FINETUNED].worst_pairs
    rows = [[str(pair.set + 1), str(pair.index + 1), f"{pair.ssim:.3f}", f"{pair.mse:.4f}"] for pair in pairs]
    return markdown_table(["set", "image", "SSIM", "MSE"], rows, text_columns=0)


def write_markdown(found: FinishedReports, comparison: str, policy: Path) -> str:
    """Write the comment of a pull request."""
    verdict = found.verdict
    folded = {
        "Why: the numbers and their limits": "\n".join(f"- {reason}" for reason in verdict.reasons),
        "Least similar pairs": write_worst_pairs(found),
        "Protocol": f"{protocol_to_text(found.record)} {latency_to_text(found.costs)}",
    }
    parts = [
        f"### {WORDS[verdict.level]}: {verdict.sentence}",
        write_table(found),
        comparison,
        write_gate(found, policy),
        *(f"<details><summary>{title}</summary>\n\n{text}\n\n</details>" for title, text in folded.items()),
    ]
    return "\n\n".join(part.strip() for part in parts if part)


def write_plain(found: FinishedReports, comparison: str, policy: Path) -> str:
    """Write what follows the verdict in a terminal."""
    worst = f"Least similar pairs\n\n{write_worst_pairs(found)}"
    return "\n\n".join(
        part.strip() for part in (write_table(found), comparison, write_gate(found, policy), worst) if part
    )
