"""``make model``: all bounds, then each mistake with the shortest way to what it breaks. Exit code 1: unexpected."""

import sys
import time

from tests.model.bounds import LARGE, QUICK, SHOWS, STATES_MAX
from tests.model.protocol import Bounds, Protocol
from tests.model.search import search


def tell(name: str, bounds: Bounds, wrong: str) -> bool:
    began = time.monotonic()
    found = search(Protocol(bounds, wrong), STATES_MAX)
    print(f"{name} ({bounds}, {time.monotonic() - began:.0f} s):\n  {found}", flush=True)
    return bool(found.error) == bool(wrong)


def main() -> int:
    right = [tell(name, bounds, "") for name, bounds in (QUICK | LARGE).items()]
    wrong = [tell(f"wrong: {name}", bounds, name) for name, bounds in SHOWS.items()]
    print(f"{sum(right)} of {len(right)} bounds without an error, {sum(wrong)} of {len(wrong)} mistakes found")
    return 0 if all(right + wrong) else 1


if __name__ == "__main__":
    sys.exit(main())
