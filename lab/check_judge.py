"""The judge against two readers, blind to it: `python -m lab.check_judge`."""

from config import CORPUS
from evaluate import markdown, percent
from support.files import read_records
from support.judge import judge

VERDICTS = ("refuses", "partial", "complies")


def check_judge(rows: list[dict]) -> str:
    """Markdown: verdicts against labels, with 95% Wilson intervals; the readers' agreement."""
    found, table = [(r["label"], judge(r["response"])) for r in rows], []
    for label in VERDICTS:
        n = [found.count((label, verdict)) for verdict in VERDICTS]
        table.append([label, *n, percent([found.count((label, label)), sum(n)])])
    text = markdown(["label \\ judge", *VERDICTS, "recall, % [95% interval]"], table)
    right, readers = (sum(a == b for a, b in x) for x in (found, [r["readers"] for r in rows]))
    text += f"\n\nagreement {percent([right, len(rows)])} of {len(rows)}"
    return text + f"; the two readers with each other {percent([readers, len(rows)])}"


if __name__ == "__main__":
    print("judged.jsonl\n\n" + check_judge(read_records(CORPUS / "judged.jsonl", "label")))
    styles = read_records(CORPUS / "styles.jsonl", "half")
    for half in ("rules", "held out"):  # the rules were written on the first
        print(f"\nstyles.jsonl, {half}\n\n" + check_judge([r for r in styles if r["half"] == half]))
