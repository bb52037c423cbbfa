"""What the suite tried, printed at its end: `COUNTS["kills survived"] += 1`."""

from collections import Counter

COUNTS: Counter = Counter()
